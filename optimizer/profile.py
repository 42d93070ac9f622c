"""Where the time goes: every launch timed on its own, against the cost model; and fusion guided by measurement.

A kernel is timed alone, on random data of its real shapes, in an executable of one launch: the median of a few runs
after a warm-up.  Caches are warm for what fits in them, as they are in the real sequence of launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.utils._pytree as pytree
from sympy import Symbol
from torch import Tensor, fx

from torchweld.codegen.cache import Cache
from torchweld.codegen.executable import BuildError, Executable
from torchweld.codegen.ir import Buffer, Kernel, size_symbol
from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.plan import Launch, Plan, ValueSpec
from torchweld.graph.fusion import Measure
from torchweld.graph.groups import GroupGraph, Lowered
from torchweld.graph.index import evaluate
from torchweld.graph.program import Program, source_line
from torchweld.optimizer.compile import Compiled, Options
from torchweld.optimizer.pipeline import size_hints

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

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


@dataclass(frozen=True)
class NodeRow:
    """One operation of a graph as torch runs it: median microseconds, bytes read and written, operations."""

    name: str
    op: str
    microseconds: float
    nbytes: int
    flops: int
    source: str


def profile_nodes(
    graph_module: fx.GraphModule, inputs: Sequence[object], runs: int = 3
) -> tuple[NodeRow, ...]:
    """Time every operation of a runnable graph at the sizes of `inputs` (flat), in graph order.

    Operations are those of torch's flop counter (matmuls, attention); one per element of the result for all others.
    """
    timer = _NodeTimer(graph_module)
    with torch.no_grad():
        for _ in range(max(1, runs)):
            timer.run(*inputs)
    return tuple(
        NodeRow(
            node.name, str(node.target), statistics.median(timer.seconds[node]) * 1e6, *timer.work[node],
            source_line(node),
        )
        for node in timer.seconds
    )  # fmt: skip


def _flop_counter() -> FlopCounterMode:
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # imports triton: 0.1 s that only a profile should take

    return FlopCounterMode(display=False)


class _NodeTimer(fx.Interpreter):
    """Runs a graph node by node and keeps every call's seconds, bytes and operations."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.seconds: dict[fx.Node, list[float]] = {}
        self.work: dict[fx.Node, tuple[int, int]] = {}

    def run_node(self, n: fx.Node) -> object:
        """Time one node; placeholders, weights and the output cost nothing."""
        if n.op not in ("call_function", "call_module"):
            return super().run_node(n)
        counter = None if n in self.seconds else _flop_counter()
        with counter or nullcontext():
            start = time.perf_counter()
            result = super().run_node(n)
            seconds = time.perf_counter() - start
        self.seconds.setdefault(n, []).append(seconds)
        if counter is not None:
            read = [self.env[operand] for operand in n.all_input_nodes]
            tensors = [t for t in pytree.tree_leaves((read, result)) if isinstance(t, Tensor)]
            made = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
            flops = counter.get_total_flops() or sum(t.numel() for t in made)
            self.work[n] = (sum(t.nbytes for t in tensors), flops)
        return result


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
            plan = self._with_weights(_single_plan(kernel, inputs, outputs, self.sizes), inputs)
            executable = Executable(plan, threads=self.threads, cache=self.cache)
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

    def _with_weights(self, plan: Plan, inputs: Sequence[Buffer]) -> Plan:
        """The plan with stored weights as constants, so that they are packed as in the whole program."""
        stored = {buffer.name for buffer in inputs if buffer.format is not None}
        weights = {spec.name: _random(spec, self.sizes) for spec in plan.inputs if spec.name in stored}
        rest = tuple(spec for spec in plan.inputs if spec.name not in stored)
        return replace(plan, inputs=rest, constants=weights)


def _single_plan(
    kernel: Kernel, inputs: Sequence[Buffer], outputs: Sequence[Buffer], sizes: Mapping[str, int]
) -> Plan:
    """A plan of one launch; a one-element-per-size input binds sizes that no buffer has as a whole dimension."""
    updated = {buffer.name: f"{buffer.name}_before" for buffer in inputs if buffer.role == "update"}
    specs = [ValueSpec(updated.get(b.name, b.name), b.dtype, b.shape) for b in inputs]
    bound = {extent.name for spec in specs for extent in spec.shape if isinstance(extent, Symbol)}
    loose = [name for name in kernel.sizes if name not in bound]
    specs += [ValueSpec(f"size_of_{name}", torch.bool, (size_symbol(name),)) for name in loose]
    outputs = [*outputs, *(buffer for buffer in inputs if buffer.name in updated)]
    values = {b.name: ValueSpec(b.name, b.dtype, b.shape) for b in outputs}
    launch = Launch(kernel, tuple(buffer.name for buffer in kernel.buffers))
    return Plan(tuple(specs), {}, values, (launch,), tuple(values), kernel.sizes, updated)


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
