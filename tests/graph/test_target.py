"""Targets: the numbers are sane, and occupancy agrees with the makers' calculators."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from torchweld.graph.target import GFX942, GPU_TARGETS, SM_80, SM_90, SM_100, GpuTarget, Target, gpu_target

CPU = Target("cpu", 40.0, 500.0, 900.0, 2000.0, 1.0, 1 << 20, 1 << 25, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"read_gb_s": 0.0},
        {"f32_gflops": -1.0},
        {"bf16_gflops": float("nan")},
        {"int8_gops": float("inf")},
        {"launch_us": -0.1},
        {"launch_us": float("nan")},
        {"l2_bytes": -1},
        {"l3_bytes": -1},
        {"cores": 0},
    ],
    ids=str,
)
def test_impossible_target_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="target 'cpu'"):
        replace(CPU, **change)  # type: ignore[arg-type]


def test_targets_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        CPU.cores = 3  # type: ignore[misc]


def test_lookup() -> None:
    assert [gpu_target(target.name) for target in GPU_TARGETS] == [SM_80, SM_90, SM_100, GFX942]
    with pytest.raises(
        ValueError, match="unknown GPU target 'sm_91': known are sm_80, sm_90, sm_100, gfx942"
    ):
        gpu_target("sm_91")


@pytest.mark.parametrize("gpu", GPU_TARGETS, ids=lambda gpu: gpu.name)
def test_ceilings_are_the_same_numbers(gpu: GpuTarget) -> None:
    ceilings = gpu.ceilings()
    assert (ceilings.name, ceilings.read_gb_s, ceilings.int8_gops) == (gpu.name, gpu.read_gb_s, gpu.int8_gops)
    assert ceilings.f32_gflops < ceilings.bf16_gflops < ceilings.int8_gops
    assert ceilings.origin == "published"
    assert gpu.threads % gpu.warp_size == 0 and gpu.threads_per_block <= gpu.threads


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "threads", "expected"),
    [
        # NVIDIA's occupancy calculator: limited by nothing, registers, shared memory, blocks.
        (SM_80, 32, 0, 256, 1.0),
        (SM_80, 128, 0, 256, 0.25),
        (SM_80, 33, 0, 256, 0.75),
        (SM_80, 255, 0, 128, 0.125),
        (SM_80, 32, 163 * 1024, 256, 0.125),
        (SM_80, 32, 48 * 1024, 128, 3 * 4 / 64),
        (SM_80, 32, 0, 32, 0.5),
        (SM_90, 168, 227 * 1024, 384, 12 / 64),
        (SM_100, 64, 0, 1024, 0.5),
        # CDNA 3: 512 registers for each lane of a SIMD, 8 waves at most.
        (GFX942, 64, 0, 256, 1.0),
        (GFX942, 128, 0, 256, 0.5),
        (GFX942, 512, 0, 256, 0.125),
        (GFX942, 64, 32 * 1024, 256, 0.25),
    ],
)
def test_occupancy(gpu: GpuTarget, registers: int, shared: int, threads: int, expected: float) -> None:
    assert gpu.occupancy(registers, shared, threads) == pytest.approx(expected)
    assert gpu.exceeded(registers, shared, threads) is None


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "message"),
    [
        (256, 0, 128, "256 registers per thread; sm_80 has 255"),
        (32, 164 * 1024, 128, "167936 bytes of shared memory per block; sm_80 allows 166912"),
        (32, 0, 1025, "1025 threads per block; sm_80 allows 1024"),
        (65, 0, 1024, "73728 registers per block; sm_80 has 65536 per multiprocessor"),
    ],
)
def test_what_does_not_fit(registers: int, shared: int, threads: int, message: str) -> None:
    assert SM_80.exceeded(registers, shared, threads) == message
    assert SM_80.occupancy(registers, shared, threads) == 0.0
