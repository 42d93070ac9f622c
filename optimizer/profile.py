"""Where the time goes: every launch timed on its own, against the cost model; and fusion guided by measurement.

A kernel is timed alone, on random data of its real shapes, in an executable of one launch: the median of a few runs
after a warm-up.  Caches are warm for what fits in them, as they are in the real sequence of launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from sympy import Symbol
from torch import Tensor

from torchweld.codegen.cache import Cache
from torchweld.codegen.executable import BuildError, Executable
from torchweld.codegen.ir import Buffer, Kernel, size_symbol
from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.plan import Launch, Plan, ValueSpec
from torchweld.graph.fusion import Measure
from torchweld.graph.groups import GroupGraph, Lowered
from torchweld.graph.index import evaluate
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options
from torchweld.optimizer.pipeline import size_hints

RUNS = 7


@dataclass(frozen=True)
class ProfileRow:
    """One kernel: how often it is launched, and one launch's time, bytes and operations."""

    kernel: str
    uses: int
    measured_us: float
    modelled_us: float
    bytes_moved: int
    flops: int


@dataclass(frozen=True)
class Profile:
    """Kernels by total time, and Spearman's rank correlation of modelled with measured time (None below 3 kernels)."""

    rows: tuple[ProfileRow, ...]
    rank_correlation: float | None


def profile(compiled: Compiled) -> Profile:
    """Time every distinct kernel at the hinted sizes; the report gets the times and the rank correlation."""
    if compiled.built is None or compiled.executable is None:
        return Profile((), None)
    timer = KernelTimer(compiled.hints, compiled.executable.threads)
    kernels = {step.kernel.name: step.kernel for step in compiled.built.plan.launches()}
    times = {name: timer(kernel) for name, kernel in kernels.items()}
    records = tuple(replace(launch, measured_us=times[launch.kernel]) for launch in compiled.report.launches)
    rows = []
    for name, measured in times.items():
        own = [record for record in records if record.kernel == name]
        first = own[0]
        rows.append(ProfileRow(name, len(own), measured, first.modelled_us, first.bytes_moved, first.flops))
    rows.sort(key=lambda row: -row.measured_us * row.uses)
    correlation = rank_correlation([r.modelled_us for r in rows], [r.measured_us for r in rows])
    compiled.report = replace(compiled.report, launches=records, rank_correlation=correlation)
    return Profile(tuple(rows), correlation)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs or a constant side."""
    if len(first) < 3:
        return None
    ranks = [torch.tensor(_ranks(values), dtype=torch.float64) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = float(centred[0].norm() * centred[1].norm())
    return None if norm == 0 else float(centred[0] @ centred[1]) / norm


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0, ties at their mean."""
    order = sorted(values)
    return [(order.index(value) + len(order) - 1 - order[::-1].index(value)) / 2 for value in values]


class KernelTimer:
    """Times kernels at fixed sizes; a kernel (by identity) is timed once."""

    def __init__(
        self, sizes: Mapping[str, int], threads: int | None = None, cache: Cache | None = None
    ) -> None:
        self.sizes, self.threads, self.cache = dict(sizes), threads, cache or Cache()
        self._known: dict[int, tuple[Kernel, float]] = {}

    def __call__(self, kernel: Kernel) -> float:
        """Median microseconds of one launch; infinity where it cannot be built."""
        if id(kernel) not in self._known:
            self._known[id(kernel)] = (kernel, self._time(kernel))
        return self._known[id(kernel)][1]

    def _time(self, kernel: Kernel) -> float:
        inputs = [buffer for buffer in kernel.buffers if buffer.role != "output"]
        outputs = [buffer for buffer in kernel.buffers if buffer.role == "output"]
        try:
            executable = Executable(
                _single_plan(kernel, inputs, outputs, self.sizes), threads=self.threads, cache=self.cache
            )
        except BuildError:
            return float("inf")
        tensors = [_random(spec, self.sizes) for spec in executable.plan.inputs]
        executable(*tensors)
        seconds = []
        for _ in range(RUNS):
            start = time.perf_counter()
            executable(*tensors)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) * 1e6


def _single_plan(
    kernel: Kernel, inputs: Sequence[Buffer], outputs: Sequence[Buffer], sizes: Mapping[str, int]
) -> Plan:
    """A plan of one launch; a one-element-per-size input binds sizes that no buffer has as a whole dimension."""
    specs = [ValueSpec(buffer.name, buffer.dtype, buffer.shape) for buffer in inputs]
    bound = {extent.name for spec in specs for extent in spec.shape if isinstance(extent, Symbol)}
    loose = [name for name in kernel.sizes if name not in bound]
    specs += [ValueSpec(f"size_of_{name}", torch.bool, (size_symbol(name),)) for name in loose]
    values = {b.name: ValueSpec(b.name, b.dtype, b.shape) for b in outputs}
    launch = Launch(kernel, tuple(buffer.name for buffer in kernel.buffers))
    return Plan(tuple(specs), {}, values, (launch,), tuple(values), kernel.sizes)


def _random(buffer: ValueSpec, sizes: Mapping[str, int]) -> Tensor:
    """Tame data of a buffer's dtype and shape; integers are zero, so that they are legal indices."""
    shape = tuple(evaluate(extent, sizes) for extent in buffer.shape)
    if buffer.dtype.is_floating_point:
        return torch.rand(shape, dtype=torch.float32).to(buffer.dtype)
    return torch.zeros(shape, dtype=buffer.dtype)


def kernel_timer(program: Program, example_inputs: Sequence[Tensor], options: Options) -> Measure:
    """A measure for `guide="measure"`: microseconds of a group's kernel at the example's sizes."""
    timer = KernelTimer(size_hints(program, tuple(example_inputs)), options.threads, options.cache)

    def measure(groups: GroupGraph, lowered: Lowered) -> float:
        assert isinstance(lowered, LoweredGroup)
        return timer(lowered.kernel)

    return measure
