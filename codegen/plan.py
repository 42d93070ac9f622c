"""What an executable runs: named values, launches of kernels and eager steps between them, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, fx

from torchweld.codegen.ir import Kernel, MatmulPart, Part, RowPart, part_terms, product_axes
from torchweld.codegen.library_call import LibraryCall
from torchweld.graph.index import evaluate
from torchweld.graph.terms import Attend, Axis, Contract, Expr, Fold


class PlanError(ValueError):
    """A plan that contradicts itself; names the step and the value."""


@dataclass(frozen=True)
class ValueSpec:
    """A contiguous tensor: its name in the plan, dtype and shape (expressions of the plan's sizes)."""

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]


@dataclass(frozen=True)
class Launch:
    """A kernel on values of the plan: one name per buffer of the kernel, in its order."""

    kernel: Kernel
    arguments: tuple[str, ...]

    def written(self) -> tuple[str, ...]:
        """The values that the launch computes."""
        pairs = zip(self.kernel.buffers, self.arguments, strict=True)
        return tuple(name for buffer, name in pairs if buffer.is_written)

    def updated(self) -> tuple[str, ...]:
        """Those of the written values that are a tensor of the caller, changed in place."""
        pairs = zip(self.kernel.buffers, self.arguments, strict=True)
        return tuple(name for buffer, name in pairs if buffer.role == "update")

    def read(self) -> tuple[str, ...]:
        """The values that the launch reads."""
        pairs = zip(self.kernel.buffers, self.arguments, strict=True)
        return tuple(name for buffer, name in pairs if not buffer.is_written)


@dataclass(frozen=True)
class EagerStep:
    """A sub-graph that torch runs, because of `reason`. Arguments are values or sizes (given as integers)."""

    module: fx.GraphModule
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    reason: str


Step = Launch | EagerStep


@dataclass(frozen=True)
class Plan:
    """Everything that an executable needs.

    inputs: in call order.  constants: by name, used as they are.  values: specs of everything that steps compute.
    sizes: the size symbols; each must be the whole extent of some input dimension.
    in_place: values that are an input after some of its elements were overwritten, and that input: the same memory.
    library: kernels by name that have a form in ATen, which runs in their place where the executable is told so.
    """

    inputs: tuple[ValueSpec, ...]
    constants: Mapping[str, Tensor]
    values: Mapping[str, ValueSpec]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    sizes: tuple[str, ...]
    in_place: Mapping[str, str] = field(default_factory=dict)
    library: Mapping[str, LibraryCall] = field(default_factory=dict)

    def launches(self) -> tuple[Launch, ...]:
        """The launches in order."""
        return tuple(step for step in self.steps if isinstance(step, Launch))

    def check(self) -> None:
        """Raise PlanError unless every value is known where it is read, and every launch fits its kernel."""
        known = {spec.name for spec in self.inputs} | set(self.constants)
        for number, step in enumerate(self.steps):
            where = f"step {number} ({step.kernel.name if isinstance(step, Launch) else 'eager'})"
            if isinstance(step, Launch):
                if len(step.arguments) != len(step.kernel.buffers):
                    expected, given = len(step.kernel.buffers), len(step.arguments)
                    raise PlanError(
                        f"{where}: the kernel has {expected} buffers, the launch {given} arguments"
                    )
                if extra := set(step.kernel.sizes) - set(self.sizes):
                    raise PlanError(f"{where}: sizes {sorted(extra)} are not sizes of the plan {self.sizes}")
                read, written = step.read(), step.written()
            else:
                read = tuple(name for name in step.arguments if name not in self.sizes)
                written = step.results
            if missing := [name for name in read if name not in known]:
                raise PlanError(f"{where} reads {missing}, which nothing before it computes")
            if twice := [name for name in written if name in known]:
                raise PlanError(f"{where} computes {twice}, which exist already")
            if isinstance(step, Launch) and (bare := [name for name in written if name not in self.values]):
                raise PlanError(f"{where} computes {bare}, which have no ValueSpec")
            if isinstance(step, Launch):
                self._check_updates(number, step, where)
            known |= set(written)
        if missing := [name for name in self.outputs if name not in known]:
            raise PlanError(f"outputs {missing} are computed by no step")
        for launch in self.launches():
            call = self.library.get(launch.kernel.name)
            if call and (call.inputs, len(call.results)) != (len(launch.read()), len(launch.written())):
                raise PlanError(f"kernel {launch.kernel.name}: its form in ATen has other inputs or results")

    def _check_updates(self, number: int, launch: Launch, where: str) -> None:
        """Raise PlanError unless what a launch updates is an input that nothing after it reads as it was before."""
        inputs = {spec.name for spec in self.inputs}
        for name in launch.updated():
            source = self.in_place.get(name)
            if source is None or source not in inputs:
                raise PlanError(f"{where} updates {name}, which stands for no input")
            if list(self.in_place.values()).count(source) > 1 or source in self.outputs:
                raise PlanError(f"{where} updates {source}, whose old value is asked for as well")
            for other, step in enumerate(self.steps[number:], number):
                reads = step.read() if isinstance(step, Launch) else step.arguments
                if source in reads:
                    raise PlanError(f"{where} updates {source}, which step {other} reads as it was before")


class SizeTable:
    """Values of expressions for one binding of the sizes; every distinct expression is evaluated once."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self._known: dict[Expr, int] = {}

    def __call__(self, expr: Expr) -> int:
        """The value of `expr`."""
        if expr not in self._known:
            self._known[expr] = int(expr) if expr.is_Integer else evaluate(expr, self.sizes)
        return self._known[expr]

    def shape(self, spec: ValueSpec) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(self(extent) for extent in spec.shape)


@dataclass(frozen=True)
class Work:
    """About how many vectorized element operations a part takes: the points of `grid`, times `base` and the sum of the
    points of every one of `inner` divided by `vector`."""

    grid: tuple[Expr, ...]
    inner: tuple[tuple[Expr, ...], ...]
    base: int
    vector: int

    def __call__(self, table: SizeTable) -> int:
        """The number for one binding of the sizes."""
        inner = sum(prod(map(table, extents)) for extents in self.inner)
        return prod(map(table, self.grid)) * (self.base + inner // self.vector)


def work(kernel: Kernel) -> tuple[Work, ...]:
    """The work of a kernel's parts: for deciding whether a launch is worth sharing out."""
    return tuple(_part_work(part) for part in kernel.parts)


def _part_work(part: Part) -> Work:
    def extents(*axes: Axis) -> tuple[Expr, ...]:
        return tuple(axis.extent for axis in axes)

    if isinstance(part, RowPart):
        folds = [extents(*term.axes) for term in part_terms(part) if isinstance(term, Fold)]
        return Work(extents(*part.grid), (extents(*part.inner), *folds), 0, 1)
    if isinstance(part, MatmulPart):
        depths = tuple(extents(term.k) for term in part_terms(part) if isinstance(term, Contract))
        return Work(extents(*product_axes(part)), depths, 1, 8)
    attend = next(t for t in part_terms(part) if isinstance(t, Attend))
    # Keys and values come from beyond the L2 cache, and a few of them cost a whole block: 25 ns a pair of 64 features.
    return Work(extents(*part.batch, part.t, attend.s), (extents(part.feature),), 1, 1)
