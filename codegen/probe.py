"""Measure this machine's ceilings: what one pass over memory, one dot product and one launch cost at best.

The cost model divides bytes and operations by these, so they are measured as the kernels will meet them:
with the same compiler and flags, on all cores, threads pinned one to a core.

* Read bandwidth: a pure read (decoding never writes) of anonymous huge-page memory, each thread its own
  part, which it also touched first. Median of several passes, the better of one and four streams per
  thread. The buffer is twice the last-level cache, at least 256 MB and at most 1 GB: smaller than the
  cache of some servers, as are the weights that will be read.
* Arithmetic: loops over registers only (f32 multiply-add; bf16 and int8 dot products where the CPU has
  them: AVX-512 BF16, AVX-512 VNNI or AVX-VNNI), best of several passes. AMX is not counted: our kernels
  do not use it.
* Launch: one ctypes call of an empty function plus one barrier of the thread team, best of several batches.

On two cores of a Xeon (Sapphire Rapids class, virtual, other work running) it found 9 to 12 GB/s from a
buffer of 600 MB (45 GB/s from 64 MB, which its cache holds), 356 GFLOP/s f32, 1,370 GOP/s int8, 0.65 us.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from torchweld.codegen.cache import Cache, JsonValue, make_key
from torchweld.codegen.instructions import ISA_VARIABLE, cpu_features
from torchweld.codegen.probe_source import PROBE_SOURCE
from torchweld.codegen.toolchain import (
    Compiler,
    ToolchainError,
    compile_shared,
    load,
)
from torchweld.graph.target import Target

_MB: Final = 1 << 20
_SMALLEST_BUFFER: Final = 256 * _MB
_LARGEST_BUFFER: Final = 1024 * _MB
_HUGE_PAGE: Final = 2 * _MB
_READ_PASSES: Final = 5
_COMPUTE_PASSES: Final = 8
_COMPUTE_ROUNDS: Final = 400_000
_BARRIERS: Final = 2000
_CALLS: Final = 2000
_KINDS: Final = ("f32", "bf16", "int8")
# What a launch costs where it cannot be measured: a call of torch's dispatcher.
_ROUGH_LAUNCH_US: Final = 5.0

_SYMBOLS: Final = ("probe_nothing", "probe_touch", "probe_read", "probe_compute", "probe_barriers")


@dataclass(frozen=True)
class Machine:
    """What the system tells unmeasured. cpus: one logical CPU for each core that this process may use."""

    name: str
    cpus: tuple[int, ...]
    l2_bytes: int
    l3_bytes: int


_FAR: Final = 1.5  # one minute of a shared host and the next


def measured_target(cache: Cache) -> Target:
    """This machine's ceilings, measured once in about 1 s and then read from the cache.

    `origin` is "measured", or "rough" where there is no working compiler. Numbers taken while other
    processes were running are measured again at the first call that finds the machine idle; then the
    better of the two counts, unless nothing is far better: what was decided with the old numbers, and every plan
    that is kept for a warm start, stays as it is.
    """
    machine = describe_machine()
    path = os.environ.get(ISA_VARIABLE) or "native"
    facts = (path, machine.name, *map(str, machine.cpus), *sorted(cpu_features()))
    key = make_key("target", PROBE_SOURCE, *facts)
    known = _read_target(cache.get_json(key))
    if known is not None and (not known.busy or _others_running()):
        return known.target
    busy = _others_running()
    try:
        target = measure(machine, cache)
    except ToolchainError:
        if known is not None:
            return known.target
        return _rough_target(machine, cache)
    busy = busy or _others_running()
    if known is not None:
        better = better_ceilings(target, known.target)
        target = better if _is_far_better(better, known.target) else known.target
    cache.put_json(key, _target_json(target, busy), {"name": "ceilings of this machine"})
    return target


def measure(machine: Machine, cache: Cache, compiler: Compiler | None = None) -> Target:
    """Measure now with the compiled probe. Raises ToolchainError if it cannot be compiled or loaded."""
    flags = ("-ffp-contract=fast",)
    library = load(
        compile_shared(PROBE_SOURCE, cache=cache, flags=flags, compiler=compiler, name="probe"), _SYMBOLS
    )
    probe = _Probe(library, machine.cpus)
    rates = {kind: probe.compute(index) for index, kind in enumerate(_KINDS)}
    return Target(
        name=machine.name,
        read_gb_s=probe.read(_buffer_bytes(machine)),
        f32_gflops=rates["f32"],
        # A dot instruction can be slower than converting first: Sapphire Rapids' bf16 runs at half of f32.
        bf16_gflops=max(rates["bf16"], rates["f32"]),
        int8_gops=max(rates["int8"], rates["f32"]),
        launch_us=probe.call() + probe.barrier(),
        l2_bytes=machine.l2_bytes,
        l3_bytes=machine.l3_bytes,
        cores=len(machine.cpus),
        origin="measured",
    )


_Work: TypeAlias = Callable[[int, ctypes.c_void_p], float]


class _Probe:
    """The compiled probe on a team of threads, one pinned to each CPU."""

    def __init__(self, library: ctypes.CDLL, cpus: Sequence[int]) -> None:
        library.probe_compute.restype = ctypes.c_double
        self._library = library
        self._cpus = cpus

    def read(self, size: int) -> float:
        """GB/s, all threads together: the better median of two access patterns."""
        share = size // len(self._cpus) // _HUGE_PAGE * _HUGE_PAGE
        with mmap.mmap(
            -1, share * len(self._cpus) + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        ) as memory:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            view = ctypes.c_char.from_buffer(memory)
            base = -(-ctypes.addressof(view) // _HUGE_PAGE) * _HUGE_PAGE

            def work(index: int, team: ctypes.c_void_p) -> float:
                data = ctypes.c_void_p(base + index * share)
                self._library.probe_touch(data, ctypes.c_long(share))
                medians: list[float] = []
                for streams in (1, 4):
                    ns = (ctypes.c_long * _READ_PASSES)()
                    self._library.probe_read(team, data, ctypes.c_long(share), streams, _READ_PASSES, ns)
                    medians.append(statistics.median(ns))
                return min(medians)

            nanoseconds = self._together(work)[0]
            del view  # the mapping cannot be closed while it is exported
        return share * len(self._cpus) / nanoseconds

    def compute(self, kind: int) -> float:
        """1e9 operations per second, all threads together; 0.0 if the CPU has no instruction for the type."""

        def work(index: int, team: ctypes.c_void_p) -> float:
            ns = (ctypes.c_long * _COMPUTE_PASSES)()
            rounds = ctypes.c_long(_COMPUTE_ROUNDS)
            operations: float = self._library.probe_compute(team, kind, rounds, _COMPUTE_PASSES, ns)
            return operations / _fastest(ns)

        return sum(self._together(work))

    def barrier(self) -> float:
        """Microseconds of one barrier of the team."""

        def work(index: int, team: ctypes.c_void_p) -> float:
            ns = (ctypes.c_long * _COMPUTE_PASSES)()
            self._library.probe_barriers(team, _BARRIERS, _COMPUTE_PASSES, ns)
            return _fastest(ns) / _BARRIERS / 1e3

        return max(self._together(work))

    def call(self) -> float:
        """Microseconds of one ctypes call with three arguments."""
        function = self._library.probe_nothing
        function.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p)
        function.restype = None
        batches = []
        for _ in range(_COMPUTE_PASSES):
            start = time.perf_counter_ns()
            for _ in range(_CALLS):
                function(None, 0, None)
            batches.append(time.perf_counter_ns() - start)
        return min(batches) / _CALLS / 1e3

    def _together(self, work: _Work) -> list[float]:
        """Run `work(index, team)` on one pinned thread per CPU; ctypes releases the interpreter lock."""
        room = ctypes.create_string_buffer(4 * 64)
        team = ctypes.c_void_p(-(-ctypes.addressof(room) // 64) * 64)
        ctypes.c_int.from_address((team.value or 0) + 128).value = len(self._cpus)

        def run(index: int) -> float:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {self._cpus[index]})  # of this thread only, which ends with the pool
            return work(index, team)

        with ThreadPoolExecutor(len(self._cpus)) as pool:
            return list(pool.map(run, range(len(self._cpus))))


def _fastest(nanoseconds: ctypes.Array[ctypes.c_long]) -> int:
    return min(int(value) for value in nanoseconds)


def describe_machine() -> Machine:
    """The CPU's name, its usable cores (one logical CPU each) and cache sizes, from /proc and /sys."""
    cpus = tuple(_one_cpu_per_core(sorted(os.sched_getaffinity(0))))
    caches = _cache_bytes(cpus[0])
    cores = f"{len(cpus)} core" + "s" * (len(cpus) > 1)
    return Machine(f"{_cpu_name()}, {cores}", cpus, caches.get(2, 0), caches.get(3, 0))


def _one_cpu_per_core(cpus: Sequence[int]) -> list[int]:
    """Two hyper-threads share one set of arithmetic units, so one of each pair is enough."""
    first: dict[str, int] = {}
    for cpu in cpus:
        siblings = _read_text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        first.setdefault(siblings or str(cpu), cpu)
    return list(first.values())


def _cache_bytes(cpu: int) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
        level, size = _read_text(index / "level"), _read_text(index / "size")
        if _read_text(index / "type") != "Instruction" and level.isdigit() and size[:-1].isdigit():
            sizes[int(level)] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
    return sizes


def _cpu_name() -> str:
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _buffer_bytes(machine: Machine) -> int:
    """Twice the last-level cache within limits, and no more than a quarter of the free memory."""
    wished = min(max(2 * machine.l3_bytes, _SMALLEST_BUFFER), _LARGEST_BUFFER)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(wished, free // 4), len(machine.cpus) * _HUGE_PAGE)


def _others_running() -> bool:
    """Whether a thread besides this one is running or ready to, on a system that tells."""
    words = _read_text(Path("/proc/loadavg")).split()
    return len(words) > 3 and int(words[3].partition("/")[0]) > 1


def _rough_target(machine: Machine, cache: Cache) -> Target:
    """Without a compiler: numpy's matrix product, and its maximum over a large array in as many threads."""
    key = make_key("rough target", machine.name, *map(str, machine.cpus), np.__version__)
    known = _read_target(cache.get_json(key))
    if known is not None:
        return known.target
    array = np.ones(_SMALLEST_BUFFER // 8)
    square = np.ones((1024, 1024), np.float32)
    parts = np.array_split(array, len(machine.cpus))
    with ThreadPoolExecutor(len(parts)) as pool:
        read_seconds = _best_seconds(lambda: list(pool.map(np.max, parts)))
    flops = 2 * square.shape[0] ** 3 / _best_seconds(lambda: square @ square) / 1e9
    target = Target(
        name=machine.name,
        read_gb_s=array.nbytes / read_seconds / 1e9,
        f32_gflops=flops,
        bf16_gflops=flops,
        int8_gops=flops,
        launch_us=_ROUGH_LAUNCH_US,
        l2_bytes=machine.l2_bytes,
        l3_bytes=machine.l3_bytes,
        cores=len(machine.cpus),
        origin="rough",
    )
    cache.put_json(key, _target_json(target, busy=False), {"name": "rough ceilings of this machine"})
    return target


def _best_seconds(action: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def better_ceilings(one: Target, other: Target) -> Target:
    """The higher of each rate and the lower cost of a launch: disturbance only makes a ceiling look lower."""
    return replace(
        one,
        read_gb_s=max(one.read_gb_s, other.read_gb_s),
        f32_gflops=max(one.f32_gflops, other.f32_gflops),
        bf16_gflops=max(one.bf16_gflops, other.bf16_gflops),
        int8_gops=max(one.int8_gops, other.int8_gops),
        launch_us=min(one.launch_us, other.launch_us),
    )


def _is_far_better(better: Target, known: Target) -> bool:
    """Whether a rate or the cost of a launch is another one by more than what two quiet measurements differ by."""
    pairs = (
        (better.read_gb_s, known.read_gb_s), (better.f32_gflops, known.f32_gflops),
        (better.bf16_gflops, known.bf16_gflops), (better.int8_gops, known.int8_gops),
        (known.launch_us, better.launch_us),
    )  # fmt: skip
    return any(more > _FAR * less for more, less in pairs)


@dataclass(frozen=True)
class _Known:
    target: Target
    busy: bool


def _target_json(target: Target, busy: bool) -> JsonValue:
    return {"target": asdict(target), "busy": busy}


def _read_target(value: JsonValue) -> _Known | None:
    """The stored target, or None if the entry has not exactly the fields and types that a Target has now."""
    if not isinstance(value, dict) or not isinstance(stored := value.get("target"), dict):
        return None
    if stored.keys() != {field.name for field in fields(Target)}:
        return None
    try:
        return _Known(
            Target(
                name=str(stored["name"]),
                read_gb_s=_number(stored["read_gb_s"]),
                f32_gflops=_number(stored["f32_gflops"]),
                bf16_gflops=_number(stored["bf16_gflops"]),
                int8_gops=_number(stored["int8_gops"]),
                launch_us=_number(stored["launch_us"]),
                l2_bytes=int(_number(stored["l2_bytes"])),
                l3_bytes=int(_number(stored["l3_bytes"])),
                cores=int(_number(stored["cores"])),
                origin="rough" if stored["origin"] == "rough" else "measured",
            ),
            value.get("busy") is True,
        )
    except ValueError:
        return None


def _number(value: JsonValue) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {value!r}")
    return float(value)
