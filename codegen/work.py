"""What a kernel moves and computes: the figures behind the cost model and the headers of dumped kernels.

Bytes: every distinct buffer once, whole, except tables that are gathered from (only the rows that are read).
Operations: pointwise 1 each (transcendental ones as many as their polynomial has), multiply-adds 2.
Work on the rows of a matmul's left operand is done once per core that shares the columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from torchweld.codegen.families.common import product
from torchweld.codegen.ir import (
    AttentionPart,
    Buffer,
    Kernel,
    MatmulPart,
    Part,
    RowPart,
    part_axes,
    part_terms,
    product_axes,
)
from torchweld.graph.groups import Work
from torchweld.graph.index import evaluate
from torchweld.graph.terms import Attend, Axis, Contract, Decode, Expr, Fold, Load, Op, Term, children, walk

HEAVY = {"exp": 10, "tanh": 14, "erf": 14, "sigmoid": 12, "sin": 20, "cos": 20, "log": 12, "pow": 30, "div": 4,
         "sqrt": 4, "rsqrt": 4, "exp2": 10, "log2": 12, "expm1": 12, "log1p": 12}  # fmt: skip
DECODE_OPS = 6


def pointwise_operations(root: Term) -> int:
    """Operations to compute one element of `root`; what Folds and Contracts inside cost is counted elsewhere."""
    total = 0
    stack, seen = [root], set()
    while stack:
        term = stack.pop()
        if id(term) in seen:
            continue
        seen.add(id(term))
        if isinstance(term, Op):
            total += HEAVY.get(term.name, 1)
            stack.extend(term.args)
        elif isinstance(term, Decode):
            total += DECODE_OPS
        elif not isinstance(term, (Fold, Contract)):
            stack.extend(children(term))
    return total


def _extents(axes: tuple[Axis, ...]) -> Expr:
    return product(axis.extent for axis in axes)


def part_flops(part: Part, repeats: int) -> Expr:
    """Arithmetic operations of one part; `repeats` is how often the rows of a matmul's left operand are prepared."""
    total = _extents(part_axes(part)) * sum(pointwise_operations(store.value) for store in part.stores)
    if isinstance(part, RowPart):
        rows = _extents(part.grid)
        for bind in part.binds:
            total += rows * _fold_operations(bind.term)
    elif isinstance(part, MatmulPart):
        rows, points = _extents((*part.batch, *part.rows)), _extents(product_axes(part))
        total += sum((rows * _fold_operations(choice.term) for choice in part.choices[:1]), sympy.Integer(0))
        total += (
            repeats * rows * sum((_fold_operations(bind.term) for bind in part.row_binds), sympy.Integer(0))
        )
        for bind in part.contracts:
            contract = bind.term
            assert isinstance(contract, Contract)
            total += 2 * points * contract.k.extent
            total += repeats * rows * contract.k.extent * pointwise_operations(contract.a)
            total += _extents((*part.batch, part.n)) * contract.k.extent * pointwise_operations(contract.b)
    else:
        total += _attention_operations(part)
    return total


def _fold_operations(term: Term) -> Expr:
    total: Expr = sympy.Integer(0)
    for node in walk(term):
        if isinstance(node, Fold):
            total += _extents(node.axes) * (1 + pointwise_operations(node.body))
    return total


def _attention_operations(part: AttentionPart) -> Expr:
    attend = part.attend.term
    assert isinstance(attend, Attend)
    pairs = _extents((*part.batch, part.t)) * attend.s.extent
    share = sympy.Rational(1, 1 if attend.mask_kind == "none" else 2)
    each = 2 * (attend.d.extent + part.feature.extent) + HEAVY["exp"] + 4
    queries = _extents((*part.batch, part.t)) * attend.d.extent * pointwise_operations(attend.q)
    return pairs * share * each + queries


def buffer_bytes(buffer: Buffer, kernel: Kernel) -> Expr:
    """Bytes of a buffer that the kernel touches: all of it, the gathered rows of a table, the rows of an update."""
    if buffer.role == "update":
        written = [
            (part, store) for part in kernel.parts for store in part.stores if store.buffer == buffer.name
        ]
        elements = sum((_extents(part_axes(part)) for part, _ in written), sympy.Integer(0))
        return elements * buffer.dtype.itemsize
    whole = product(buffer.shape) * buffer.dtype.itemsize
    gathered = _gathered_rows(buffer, kernel)
    if gathered is None or not buffer.shape:
        return whole
    return gathered * product(buffer.shape[1:]) * buffer.dtype.itemsize


def _gathered_rows(buffer: Buffer, kernel: Kernel) -> Expr | None:
    """How many rows are read where every access goes through a data-dependent first index; None otherwise."""
    symbols = {entry.symbol: entry for entry in kernel.indirects}
    rows: Expr = sympy.Integer(0)
    for part in kernel.parts:
        accesses = [t for t in part_terms(part) if isinstance(t, (Load, Decode)) and t.buffer == buffer.name]
        for access in accesses:
            first = (access.index if isinstance(access, Load) else access.row)[:1]
            entry = symbols.get(str(first[0])) if first else None
            if entry is None:
                return None
            read = {
                s
                for term in walk(entry.term)
                if isinstance(term, Load)
                for e in term.index
                for s in e.free_symbols
            }
            rows += product(axis.extent for axis in part_axes(part) if axis.symbol in read)
    return rows if rows != 0 else None


def kernel_work(kernel: Kernel, cores: int) -> Work:
    """Bytes and operations of one launch, as expressions of the sizes."""
    reads = sum((buffer_bytes(b, kernel) for b in kernel.buffers if not b.is_written), sympy.Integer(0))
    writes = sum((buffer_bytes(b, kernel) for b in kernel.buffers if b.is_written), sympy.Integer(0))
    flops = sum((part_flops(part, cores) for part in kernel.parts), sympy.Integer(0))
    return Work(reads, writes, flops, len(kernel.parts))


def moved_and_minimum(kernel: Kernel, sizes: Mapping[str, int], l2_bytes: int) -> tuple[int, int]:
    """Bytes that one launch moves from and to memory, and the least possible (each buffer once).

    A buffer that several parts read comes from memory again for each of them unless it stays in half of the L2 cache;
    the rows of a matmul's left operand come again for every tile of columns unless they stay there.
    """
    minimum = moved = 0
    for buffer in kernel.buffers:
        once = evaluate(buffer_bytes(buffer, kernel), sizes)
        minimum += once
        moved += once * (_passes_over(buffer, kernel, sizes) if once > l2_bytes // 2 else 1)
    return moved, minimum


def _passes_over(buffer: Buffer, kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """How often a buffer that no cache holds is gone through."""
    if buffer.is_written:
        return 1
    passes = 0
    for part in kernel.parts:
        if not any(isinstance(t, (Load, Decode)) and t.buffer == buffer.name for t in part_terms(part)):
            continue
        tiles = 1
        if isinstance(part, MatmulPart) and buffer.role == "input":
            columns = evaluate(part.n.extent, sizes)
            tiles = max(1, -(-columns // max(1, part.schedule.block_n)))
        passes += tiles
    return max(1, passes)
