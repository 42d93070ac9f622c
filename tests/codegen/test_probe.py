"""The machine probe: it measures what it says, once, and does without a compiler if it must."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from torchweld.codegen import probe
from torchweld.codegen.cache import Cache, JsonValue
from torchweld.codegen.instructions import cpu_features
from torchweld.codegen.probe import Machine, better_ceilings, describe_machine, measure, measured_target
from torchweld.codegen.probe_source import PROBE_SOURCE
from torchweld.codegen.toolchain import compile_shared, find_compiler, load
from torchweld.graph.target import SM_80, Target

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")

STORED = Target("stored", 1.5, 10.0, 20.0, 40.0, 9.0, 1 << 20, 1 << 24, 2, "measured")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB instead of several times the cache: these tests ask whether it measures, not what."""
    monkeypatch.setattr(probe, "_SMALLEST_BUFFER", 64 << 20)
    monkeypatch.setattr(probe, "_LARGEST_BUFFER", 64 << 20)


def overwrite_stored(cache: Cache, value: JsonValue) -> None:
    (entry,) = [entry for entry in cache.entries() if "ceilings" in entry.meta["name"]]
    cache.put_json(entry.key, value, entry.meta)


# Measuring


@needs_compiler
def test_measured_numbers_are_plausible(cache: Cache) -> None:
    start = time.monotonic()
    target = measured_target(cache)
    assert time.monotonic() - start < 20
    assert target.origin == "measured"
    # Between an old laptop core and ten times today's best one, for each core.
    assert 0.5 < target.read_gb_s / target.cores < 1000
    assert 1 < target.f32_gflops / target.cores < 4000
    assert target.f32_gflops <= target.bf16_gflops
    assert target.f32_gflops <= target.int8_gops
    assert 0.01 < target.launch_us < 10_000


@needs_compiler
@pytest.mark.skipif("avx512_vnni" not in cpu_features(), reason="no int8 dot instruction")
def test_int8_dot_beats_f32(cache: Cache) -> None:
    """Four times the operations for each instruction, at the same rate or half of it."""
    machine = describe_machine()
    target = measure(replace(machine, cpus=machine.cpus[:1]), cache)
    assert target.int8_gops > 1.5 * target.f32_gflops


@needs_compiler
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump here")
@pytest.mark.skipif("fma" not in cpu_features(), reason="counts x86 instructions")
def test_no_loop_was_simplified_away(cache: Cache) -> None:
    """A compiler that sees twelve equal accumulators keeps one, and the rate comes out too high."""
    path = compile_shared(PROBE_SOURCE, cache=cache, flags=["-ffp-contract=fast"])
    text = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert text.count("vfmadd") >= 12
    assert text.count("vpaddq") >= 8
    if "avx512_bf16" in cpu_features():
        assert text.count("vdpbf16ps") == 12
    if "avx512_vnni" in cpu_features():
        assert text.count("vpdpbusd") == 12


@needs_compiler
def test_the_barrier_waits_for_the_last(cache: Cache) -> None:
    library = load(compile_shared(PROBE_SOURCE, cache=cache))
    cpu = min(os.sched_getaffinity(0))

    def work(index: int, team: ctypes.c_void_p) -> float:
        ns = (ctypes.c_long * 1)()
        time.sleep(0.2 * index)
        library.probe_barriers(team, 1, 1, ns)
        return float(ns[0])

    waited = probe._Probe(library, (cpu, cpu, cpu))._together(work)
    assert waited[0] > 0.3e9 and waited[1] > 0.1e9 and waited[2] < 0.1e9


@needs_compiler
def test_more_data_takes_longer(cache: Cache) -> None:
    """Bandwidth is bytes over time: four times the bytes are not four times the bandwidth."""
    library = load(compile_shared(PROBE_SOURCE, cache=cache))
    reader = probe._Probe(library, describe_machine().cpus[:1])
    small, large = reader.read(64 << 20), reader.read(256 << 20)
    assert 0.05 < large / small < 3


@needs_compiler
def test_affinity_of_the_caller_is_untouched(cache: Cache) -> None:
    before = os.sched_getaffinity(0)
    measure(describe_machine(), cache)
    assert os.sched_getaffinity(0) == before


# Remembering


@needs_compiler
def test_second_call_reads_the_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_others_running", lambda: False)
    first = measured_target(cache)
    assert measured_target(cache) == first
    overwrite_stored(cache, {"target": asdict(STORED), "busy": False})
    assert measured_target(cache) == STORED


def test_numbers_that_are_hardly_better_change_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for a warm start are kept under these numbers: a second measurement must not make every start cold."""
    first = measured_target(cache)
    overwrite_stored(cache, {"target": asdict(first), "busy": True})
    monkeypatch.setattr(probe, "_others_running", lambda: False)
    monkeypatch.setattr(
        probe, "measure", lambda machine, cache: replace(first, f32_gflops=1.4 * first.f32_gflops)
    )
    assert measured_target(cache) == first
    monkeypatch.setattr(
        probe, "measure", lambda machine, cache: replace(first, f32_gflops=9 * first.f32_gflops)
    )
    assert measured_target(cache) == first  # and it is not measured a third time


@needs_compiler
def test_numbers_of_a_busy_machine_are_measured_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_others_running", lambda: True)
    measured_target(cache)
    stored = replace(STORED, read_gb_s=1e6, f32_gflops=0.5, launch_us=1e6)
    overwrite_stored(cache, {"target": asdict(stored), "busy": True})
    assert measured_target(cache) == stored  # still busy: no use in trying

    monkeypatch.setattr(probe, "_others_running", lambda: False)
    target = measured_target(cache)
    assert target.read_gb_s == 1e6  # the better of the two
    assert target.f32_gflops > 0.5 and target.launch_us < 1e6
    assert measured_target(cache) == target  # and now it stands


@needs_compiler
@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {},
        {"target": None, "busy": False},
        {"target": asdict(STORED) | {"read_gb_s": 0.0}, "busy": False},
        {"target": asdict(STORED) | {"read_gb_s": "fast"}, "busy": False},
        {"target": asdict(STORED) | {"cores": True}, "busy": False},
        {"target": asdict(STORED) | {"surplus": 1}, "busy": False},
        {"target": {"name": "half"}, "busy": False},
    ],
    ids=str,
)
def test_stored_nonsense_is_not_believed(value: JsonValue) -> None:
    assert probe._read_target(value) is None


def test_stored_target_comes_back() -> None:
    for busy in (False, True):
        known = probe._read_target(probe._target_json(STORED, busy))
        assert known is not None and (known.target, known.busy) == (STORED, busy)


# Without a compiler


def test_without_a_compiler_it_is_rough_and_says_so(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as if ziglang were not installed
    target = measured_target(cache)
    assert target.origin == "rough"
    assert target.read_gb_s > 0.5 and target.f32_gflops > 1
    assert measured_target(cache) == target


@needs_compiler
def test_a_compiler_that_appears_later_is_used(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        without.delenv("CXX", raising=False)
        without.setattr("importlib.util.find_spec", lambda name: None)
        assert measured_target(cache).origin == "rough"
    assert measured_target(cache).origin == "measured"


# Describing


def test_machine_description() -> None:
    machine = describe_machine()
    assert machine.name and set(machine.cpus) <= os.sched_getaffinity(0)
    assert len(set(machine.cpus)) == len(machine.cpus) >= 1
    assert machine.l2_bytes >= 0 and machine.l3_bytes >= 0


def test_buffer_is_larger_than_the_cache_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    for l3, wished in [(0, 256), (32, 256), (300, 600), (4096, 1024)]:
        size = probe._buffer_bytes(Machine("m", (0,), 0, l3 << 20))
        assert size == wished << 20 or math.isclose(size, free, rel_tol=0.3)


def test_the_better_ceiling_counts() -> None:
    one = SM_80.ceilings()
    other = replace(
        one, read_gb_s=one.read_gb_s * 2, f32_gflops=one.f32_gflops / 2, launch_us=one.launch_us / 2
    )
    best = better_ceilings(one, other)
    assert (best.read_gb_s, best.f32_gflops, best.launch_us) == (
        other.read_gb_s,
        one.f32_gflops,
        other.launch_us,
    )
    assert best == better_ceilings(other, one)
