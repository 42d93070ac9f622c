"""The kernel IR: one description of a fused kernel, for two printers and a reference interpreter.

A kernel is one launch.  It holds one or more *parts* with disjoint grids (horizontal and input fusion put several
parts into one kernel: a program looks at its number and runs the part that owns it).  A part has parallel axes,
values bound once per parallel point, and stores.  There are three kinds, one per way of looping:

    RowPart        for each point of grid: binds (Folds), then for inner: stores     pointwise, norms, softmax, gathers
    MatmulPart     for each tile of rows x n: contracts over k, then stores          linear, bmm, with pro- and epilogue
                    or the greatest entries of every row, and stores of those      argmax, top-k of a linear
    AttentionPart  for each (batch, query row): online softmax over s, then stores   attention

All buffers are contiguous and row-major; one of role "update" is a caller's tensor of which some elements are
overwritten: no part loads it.  No two stores of a kernel touch the same element; no load of a kernel
reads an element that the kernel stores.  Empty extents are legal everywhere and mean: nothing to do (an empty
`k` or fold axis gives the identity).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import sympy
import torch

from torchweld.graph.index import evaluate
from torchweld.graph.terms import Axis, Expr, Term, walk


@dataclass(frozen=True)
class Buffer:
    """A kernel argument: contiguous, of `shape`; a stored weight is uint8 [..., row_bytes] with `format` set.

    The kernel reads inputs and weights, writes all of an output, and some of an update (the rest of it stays).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Expr, ...]
    role: Literal["input", "weight", "output", "update"]
    format: str | None = None

    @property
    def is_written(self) -> bool:
        """Whether the kernel stores to it."""
        return self.role in ("output", "update")

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the whole buffer for given sizes."""
        return prod(evaluate(extent, sizes) for extent in self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bind:
    """`name := term`, computed once per point of the axes that the part says; used through `Ref(name)`."""

    name: str
    term: Term


@dataclass(frozen=True)
class Store:
    """buffer[index] = value (cast to the buffer's dtype)."""

    buffer: str
    index: tuple[Expr, ...]
    value: Term


@dataclass(frozen=True)
class Indirect:
    """A data-dependent index: `symbol` stands in index expressions for the value of `term` (an integer).

    Legal values are 0 <= term < extent (negative ones are wrapped by the term itself); anything else must not be
    read: it raises the runtime's index error on the CPU and reads as 0 on a GPU.
    """

    symbol: str
    term: Term
    extent: Expr


@dataclass(frozen=True)
class Schedule:
    """How a part is run; flat, so that it can be listed, cached, searched and printed.

    block_rows   rows (grid points or matmul rows) per program     block_n    output columns per program
    block_k      elements of the summed axis per step              warps, stages   GPU only
    split_keys   keys that one program of an attention takes where programs are few (GPU only; 0: all of them)
    unroll_rows, unroll_n   register tile of the CPU matmul
    """

    block_rows: int = 1
    block_n: int = 64
    block_k: int = 64
    warps: int = 4
    stages: int = 2
    unroll_rows: int = 4
    unroll_n: int = 4
    split_keys: int = 0


@dataclass(frozen=True)
class RowPart:
    """for grid (parallel): binds in order; for inner: stores.

    Binds depend on grid axes only.  Stores may use grid and inner axes.  `inner` may be empty (one value per point).
    """

    grid: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    binds: tuple[Bind, ...]
    stores: tuple[Store, ...]
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(frozen=True)
class MatmulPart:
    """for batch, rows (m), n (parallel, tiled): row_binds per (batch, rows); contracts; stores.

    The A operand of every contract depends on (batch, rows, k) and may use row binds; the B operand on (batch, n, k).
    Every store is over (batch, rows, n) and uses contracts and row binds through `Ref`.
    `rows` are flattened row-major into m; a row's result must not depend on how many rows there are.

    With `choices` the products are searched, not stored: every choice is a Fold over n, max or argmax, of one and the
    same body, which uses contracts and row binds; every store is over (batch, rows, ranks) and uses choices and row
    binds.  `ranks` is empty, or the one axis that the choices' rank is: its extent, a number, is how many entries of
    each row are found.
    """

    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    n: Axis
    row_binds: tuple[Bind, ...]
    contracts: tuple[Bind, ...]
    stores: tuple[Store, ...]
    schedule: Schedule = field(default_factory=Schedule)
    choices: tuple[Bind, ...] = ()
    ranks: tuple[Axis, ...] = ()


@dataclass(frozen=True)
class AttentionPart:
    """for batch (b, head), t (parallel): the attend, for every feature; stores over (batch, t, feature)."""

    batch: tuple[Axis, ...]
    t: Axis
    feature: Axis
    attend: Bind
    stores: tuple[Store, ...]
    schedule: Schedule = field(default_factory=Schedule)


Part = RowPart | MatmulPart | AttentionPart


@dataclass(frozen=True)
class Kernel:
    """One launch.  `sizes` are the names of the size symbols (int64 arguments), `buffers` the pointer arguments.

    The printers' signature is: buffers in order, then sizes in order.  `sources` are the user's source lines,
    `ops` the graph operations that were fused.
    """

    name: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[str, ...]
    parts: tuple[Part, ...]
    indirects: tuple[Indirect, ...] = ()
    sources: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()

    def buffer(self, name: str) -> Buffer:
        """The argument called `name`."""
        for candidate in self.buffers:
            if candidate.name == name:
                return candidate
        raise KeyError(
            f"kernel {self.name}: no buffer {name!r}; it has {', '.join(b.name for b in self.buffers)}"
        )


def part_axes(part: Part) -> tuple[Axis, ...]:
    """The axes of a part's stores, outermost first."""
    match part:
        case RowPart():
            return part.grid + part.inner
        case MatmulPart():
            return (*part.batch, *part.rows, *(part.ranks if part.choices else (part.n,)))
        case AttentionPart():
            return (*part.batch, part.t, part.feature)


def product_axes(part: MatmulPart) -> tuple[Axis, ...]:
    """The axes of a matmul's products; those of its stores too, unless the products are searched."""
    return (*part.batch, *part.rows, part.n)


def part_binds(part: Part) -> tuple[Bind, ...]:
    """Everything that a part binds, in order of use."""
    match part:
        case RowPart():
            return part.binds
        case MatmulPart():
            return part.row_binds + part.contracts + part.choices
        case AttentionPart():
            return (part.attend,)


def part_terms(part: Part) -> Iterator[Term]:
    """Every distinct node of every bind and store value of a part."""
    seen: set[int] = set()
    roots = [bind.term for bind in part_binds(part)] + [store.value for store in part.stores]
    for root in roots:
        for term in walk(root):
            if id(term) not in seen:
                seen.add(id(term))
                yield term


def size_symbol(name: str) -> sympy.Symbol:
    """The symbol of a size argument: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)
