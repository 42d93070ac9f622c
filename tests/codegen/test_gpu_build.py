"""Kernels compile for all four GPUs without one and without spills; damage and crashing compilers are noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests import kernels_by_hand as by_hand
from torchweld.codegen.cache import Cache
from torchweld.codegen.gpu_build import GpuBuild, GpuBuildError, build_for_gpus, check_elf
from torchweld.codegen.triton import build_triton
from torchweld.graph.target import GFX942, GPU_TARGETS, SM_80, SM_90

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("gpu-cache"))


@pytest.fixture(scope="module")
def builds(shared_cache: Cache) -> list[GpuBuild]:
    """One kernel of each kind, and one with two parts, for all targets."""
    names = ("softmax_argmax", "norm_gated_linear_q8_0", "attention_soft_cap_mask", "gather_concat")
    kernels = [build_triton(by_hand.ALL[name]()) for name in names]
    return build_for_gpus(kernels, GPU_TARGETS, cache=shared_cache)


@pytest.mark.slow
def test_every_kind_of_kernel_fits_every_target(builds: list[GpuBuild]) -> None:
    assert len(builds) == 4 * len(GPU_TARGETS)
    for build in builds:
        assert build.problem is None, f"{build.kernel} for {build.target}: {build.problem}"
        assert build.resources is not None
        assert build.resources.registers > 0 and build.resources.spilled_bytes == 0
        assert 0 < build.occupancy <= 1


@pytest.mark.slow
def test_assembly_is_for_the_target(builds: list[GpuBuild]) -> None:
    texts = {build.target: build.assembly for build in builds}
    assert ".target sm_80" in texts["sm_80"]
    assert ".target sm_90a" in texts["sm_90"]
    assert ".target sm_100a" in texts["sm_100"]
    assert "gfx942" in texts["gfx942"]


@pytest.mark.slow
def test_second_build_comes_from_the_cache(builds: list[GpuBuild], shared_cache: Cache) -> None:
    hits = shared_cache.stats().hits
    again = build_for_gpus([build_triton(by_hand.ALL["softmax_argmax"]())], GPU_TARGETS, cache=shared_cache)
    assert [build.digest for build in again] == [build.digest for build in builds[:4]]
    assert shared_cache.stats().hits == hits + 4


@pytest.mark.slow
def test_truncated_and_foreign_binaries_are_refused(builds: list[GpuBuild]) -> None:
    by_target = {build.target: build.binary for build in builds}
    check_elf(by_target["sm_90"], SM_90)
    with pytest.raises(GpuBuildError, match="cut short"):
        check_elf(by_target["sm_90"][: len(by_target["sm_90"]) // 2], SM_90)
    with pytest.raises(GpuBuildError, match="ELF machine 190, expected 224"):
        check_elf(by_target["sm_90"], GFX942)
    with pytest.raises(GpuBuildError, match="no 64-bit ELF file"):
        check_elf(b"", SM_80)


def test_a_kernel_that_does_not_compile_is_a_problem_and_the_next_one_is_built() -> None:
    good = build_triton(by_hand.add_relu_broadcast())
    bad = replace(good, source=good.source.replace("tl.store(", "tl.no_such_function("))
    first, second = build_for_gpus([bad, good], [SM_80], workers=1)
    assert first.problem is not None and "no_such_function" in first.problem and first.binary == b""
    assert second.problem is None and second.binary[:4] == b"\x7fELF"


def test_a_compiler_that_dies_is_a_problem_and_the_next_kernel_is_built() -> None:
    good = build_triton(by_hand.add_relu_broadcast())
    deadly = replace(good, source="import os\nos._exit(3)\n" + good.source)
    first, second = build_for_gpus([deadly, good], [SM_80], workers=1)
    assert first.problem is not None and "ended with code 3" in first.problem
    assert second.problem is None


def test_a_spill_and_a_broken_limit_are_problems(tmp_path: Path) -> None:
    printed = build_triton(by_hand.add_relu_broadcast())
    cache = Cache(tmp_path)
    build_for_gpus([printed], [SM_80], workers=1, cache=cache)
    small = replace(SM_80, registers_per_thread=8)
    (build,) = build_for_gpus([printed], [small], cache=cache)
    assert build.problem is not None and "8" in build.problem and build.has_spilled and build.occupancy == 0
