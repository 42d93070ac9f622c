"""Which size of a plan is a batch: its elements do not meet, so they can be computed in pieces, one after the other.

A thread takes a piece through all launches alone. No barrier stands between two launches, and what a launch writes is
still in the thread's cache when the next one reads it. Source: depth-first tiling of a graph's independent axis.

A size is a batch if it is the first extent of inputs, values and outputs and stands nowhere else, and every part of a
kernel runs over it with its first axis, which stands as the first index of what it reads and writes of those, and
nowhere else: not in another index, not as a number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import sympy

from torchweld.codegen.ir import Kernel, MatmulPart, Part, part_axes, part_terms
from torchweld.codegen.plan import Plan, SizeTable
from torchweld.codegen.runtime.team import LaunchRecord, PiecesRecord
from torchweld.graph.terms import Axis, Decode, Expr, Load, Term, bound_axes, index_exprs, walk

PIECE_BYTES: Final = 2 << 20
"""Of intermediate values of a piece, about an L2 cache: of those that a layer uses at a time half as many."""
_UNEVEN: Final = 1.15  # a batch that leaves a thread idle for longer is cut by rows instead


def find_batch(plan: Plan) -> str | None:
    """The name of the size that is a batch, or None."""
    if plan.in_place or len(plan.launches()) != len(plan.steps) or not plan.steps:
        return None
    return next((name for name in plan.sizes if _is_batch(plan, name)), None)


def has_batch(shape: Sequence[Expr], name: str) -> bool | None:
    """Whether the first extent is the size; None where it stands in any other way."""
    if not any(name in _names(extent) for extent in shape):
        return False
    first, *rest = shape
    return True if str(first) == name and not any(name in _names(extent) for extent in rest) else None


@dataclass(frozen=True)
class Pieces:
    """A batch in `count` pieces: the sizes of each, and of the last one, which may be smaller."""

    name: str
    table: SizeTable
    last: SizeTable
    count: int


class BatchSplitter:
    """Decides for one plan how a batch is cut. few: rows of a product up to which it has an arithmetic of its own."""

    def __init__(self, plan: Plan, threads: int, few: int) -> None:
        self._plan, self._threads, self._few = plan, threads, few
        self._name = find_batch(plan)
        parts = [part for kernel in _kernels(plan) for part in kernel.parts]
        self._rows = [tuple(a.extent for a in part.rows) for part in parts if isinstance(part, MatmulPart)]

    def split(self, table: SizeTable, bytes_of: Callable[[SizeTable], int]) -> Pieces | None:
        """The pieces of a call, or None where it stays whole. bytes_of: of the intermediate values for some sizes."""
        if self._name is None or not self._rows or table.sizes[self._name] < 2:
            return None
        extent, name = table.sizes[self._name], self._name
        piece = choose_piece(extent, self._threads, lambda count: bytes_of(_resized(table, name, count)))
        count = -(-extent // piece)
        busiest = -(-count // self._threads) * piece
        if count < 2 or busiest * self._threads > _UNEVEN * extent:
            return None
        pieces = Pieces(
            name, _resized(table, name, piece), _resized(table, name, extent - (count - 1) * piece), count
        )
        return pieces if self._keeps_arithmetic(table, pieces) else None

    def _keeps_arithmetic(self, table: SizeTable, pieces: Pieces) -> bool:
        """Whether every product of more than a few rows still has more than those in each piece."""
        for extents in self._rows:
            whole, *rest = (prod(map(sizes, extents)) for sizes in (table, pieces.table, pieces.last))
            if whole > self._few >= min(rest):
                return False
        return True


def choose_piece(extent: int, threads: int, bytes_of: Callable[[int], int]) -> int:
    """Elements of a piece: every thread has a share, cut into as few as keep `bytes_of(elements)` in the cache."""
    share = -(-extent // threads)
    for count in range(1, share):
        piece = -(-share // count)
        if bytes_of(piece) <= PIECE_BYTES:
            return piece
    return 1


def _resized(table: SizeTable, name: str, extent: int) -> SizeTable:
    return SizeTable({**table.sizes, name: extent})


class PiecesRun:
    """What team.cpp needs to run pieces: `record`, and the arrays that it points to.

    last: the launches of the last piece.  strides: of every value of the batch its bytes per piece, by its slot.
    arena: slots of intermediate values, which every thread has in its own `arena_bytes`.
    """

    def __init__(
        self, count: int, last: ctypes.Array[LaunchRecord], slots: int, threads: int,
        strides: Mapping[int, int], arena: Iterable[int], arena_bytes: int,
    ) -> None:  # fmt: skip
        of_piece, of_thread = (ctypes.c_int64 * slots)(), (ctypes.c_int64 * slots)()
        for slot, stride in strides.items():
            of_piece[slot] = stride
        for slot in arena:
            of_thread[slot] = arena_bytes
        tables = (ctypes.c_void_p * (threads * slots))()
        self._kept = (last, of_piece, of_thread, tables)
        self.record = PiecesRecord(
            ctypes.addressof(last), ctypes.addressof(tables), ctypes.addressof(of_piece),
            ctypes.addressof(of_thread), slots, count, 0,
        )  # fmt: skip


def _is_batch(plan: Plan, name: str) -> bool:
    inputs = [has_batch(spec.shape, name) for spec in plan.inputs]
    written = [plan.values[value] for launch in plan.launches() for value in launch.written()]
    if None in inputs or not any(inputs) or not all(has_batch(spec.shape, name) for spec in written):
        return False
    if any(output in plan.constants for output in plan.outputs):
        return False
    return all(_is_kernel_of_batch(kernel, name) for kernel in _kernels(plan))


def _kernels(plan: Plan) -> Iterable[Kernel]:
    return {id(launch.kernel): launch.kernel for launch in plan.launches()}.values()


def _is_kernel_of_batch(kernel: Kernel, name: str) -> bool:
    if any(isinstance(part, MatmulPart) and part.choices for part in kernel.parts):
        return False  # its lists lie in memory that all threads share
    buffers = {buffer.name: has_batch(buffer.shape, name) for buffer in kernel.buffers}
    axes = [_batch_axis(part, name) for part in kernel.parts]
    if None in buffers.values() or None in axes:
        return False
    symbols = {axis.symbol for axis in axes if axis is not None}
    for indirect in kernel.indirects:
        if name in _names(indirect.extent) or not _is_term_of_batch(indirect.term, symbols, name, buffers):
            return False
    return all(
        all(_is_term_of_batch(term, symbols, name, buffers) for term in part_terms(part))
        and all(
            _is_access(buffers[s.buffer], s.index, symbols, name) and buffers[s.buffer] for s in part.stores
        )
        for part in kernel.parts
    )


def _batch_axis(part: Part, name: str) -> Axis | None:
    """The part's first axis if it runs over the batch, and no other does."""
    first, *rest = part_axes(part)
    alone = not any(name in _names(axis.extent) for axis in rest)
    return first if str(first.extent) == name and alone else None


def _is_term_of_batch(
    root: Term, symbols: set[sympy.Symbol], name: str, buffers: dict[str, bool | None]
) -> bool:
    for term in walk(root):
        if any(name in _names(axis.extent) for axis in bound_axes(term)):
            return False
        if isinstance(term, Load | Decode):
            if not _is_access(buffers[term.buffer], index_exprs(term), symbols, name):
                return False
        elif any(_meets(expr, symbols, name) for expr in index_exprs(term)):
            return False
    return True


def _is_access(batched: bool | None, index: Sequence[Expr], symbols: set[sympy.Symbol], name: str) -> bool:
    """Whether the element belongs to the piece: of a batched buffer its own row, of any other the same for all."""
    if batched and index[0] not in symbols:
        return False
    return not any(_meets(expr, symbols, name) for expr in index[1 if batched else 0 :])


def _meets(expr: Expr, symbols: set[sympy.Symbol], name: str) -> bool:
    free = sympy.sympify(expr).free_symbols
    return bool(free & symbols) or name in {str(symbol) for symbol in free}


def _names(expr: Expr) -> set[str]:
    return {str(symbol) for symbol in sympy.sympify(expr).free_symbols}
