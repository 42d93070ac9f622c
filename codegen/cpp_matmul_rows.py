"""What the parts of a kernel say of the rows that a matmul reads: their copies in scratch memory, written once.

Parts that lie side by side often read the same rows: q, k and v of one norm. They have axes and names of their own, so
what they do is compared as text, with numbers for those names. A part behind one that says the same finds its rows
where it would write them (SmolLM2, q, k and v of 512 rows in bfloat16: 449 us with three norms, 322 with one).
Rows that lie in memory as products read them are copied from there: no panel of floats stands between.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import sympy
import torch

from torchweld.codegen.cpp_fingerprint import fingerprint
from torchweld.codegen.cpp_names import converted, unwrapped
from torchweld.codegen.cpp_operand import StoredRow
from torchweld.codegen.cpp_packed import Copies, copy_lines, sums_wanted
from torchweld.codegen.cpp_segments import piece_length
from torchweld.codegen.cpp_terms import Emitter
from torchweld.codegen.ir import Bind, Kernel, MatmulPart, RowPart, Store
from torchweld.graph.index import linearize
from torchweld.graph.terms import Axis, Contract, Expr, Load, Ref, Term, bound_axes, walk

READY: Final = "tw_ready"
"""The variable of a kernel that says which block of rows the scratch memory holds, or -1."""


@dataclass(frozen=True)
class PrintedPart:
    """The statements of a part and the bytes of scratch memory per thread that they need.

    rows: of a MatmulPart, what decides which rows are written where in scratch memory. Directly behind a part with an
    equal one the rows need not be written again: READY stays as it is.
    """

    lines: list[str]
    scratch: Expr | int
    rows: str = ""


@dataclass(frozen=True)
class Product:
    """One contract of the part: where its A rows are, how its B rows are read, the name of its sums."""

    bind: Bind
    contract: Contract
    panel: Panel
    stored: StoredRow | None
    name: str
    weights: str  # the columns of the block as tiles, for packed weights: in bfloat16; with a scale per row, the scales


@dataclass(frozen=True)
class Panel:
    """A rows written out as numbers, shared by all contracts with the same A term."""

    term: Term
    k: Axis
    name: str
    stride: str
    width: Expr
    sums: str | None  # sums of every 32 numbers of a row, for packed weights with an offset
    copies: Copies | None  # of the rows in other precisions, for packed weights


def numbered_names(lines: Sequence[str], names: Collection[str]) -> str:
    """The lines with the identifiers in `names` replaced by numbers, in the order in which they come."""
    numbers: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        name = found[0]
        return numbers.setdefault(name, f"${len(numbers)}") if name in names else name

    return re.sub(r"\b[A-Za-z_]\w*", numbered, "\n".join(lines))


def fill_panel(emitter: Emitter, panel: Panel, real: torch.dtype, is_narrow: bool) -> None:
    """Add what writes row `r` of a block to the panel, and its copies; is_narrow: `narrow` says which of them count."""
    lying = _lying_row(emitter, panel)
    if lying is None or panel.copies is None:
        _write_panel(emitter, panel, real, is_narrow)
        return
    emitter.push()
    _write_panel(emitter, panel, real, is_narrow)
    written = emitter.pop()
    emitter.nest("if (narrow)", copy_lines(panel.copies, lying, panel.stride, is_narrow=True))
    emitter.nest("else", written)


def _write_panel(emitter: Emitter, panel: Panel, real: torch.dtype, is_narrow: bool) -> None:
    k = emitter.axis(panel.k)
    at = "panel_row" if is_narrow else "r"
    row = f"{panel.name}[{at} * {panel.stride} + {k}]"
    emitter.push((panel.k.name,))
    emitter.line(f"{row} = {unwrapped(converted(emitter.value(panel.term), panel.term.dtype, real))};")
    inner = emitter.pop()
    piece = piece_length(walk(panel.term), panel.k)
    for line in emitter.vector_loop(panel.k, inner, piece=piece):
        emitter.line(line)
    if panel.width != panel.k.extent:
        extent = unwrapped(emitter.index(panel.k.extent))
        emitter.line(f"for (int64_t {k} = {extent}; {k} < {panel.stride}; ++{k}) {row} = 0;")
    if panel.sums is not None:
        place = f"{panel.sums} + {at} * ({panel.stride} / 32)"
        few = f"if ({sums_wanted(panel.copies)}) " if panel.copies is not None else ""
        emitter.line(f"{few}tw_sum_runs({panel.name} + {at} * {panel.stride}, {panel.stride}, {place});")
    if panel.copies is not None:
        for line in copy_lines(panel.copies, f"{panel.name} + {at} * {panel.stride}", panel.stride):
            emitter.line(line)


def _lying_row(emitter: Emitter, panel: Panel) -> str | None:
    """Where a row lies in memory as its copies can be made of it, without a panel between; None if it does not."""
    term, copies = panel.term, panel.copies
    if not isinstance(term, Load) or copies is None or panel.width != panel.k.extent:
        return None
    buffer = emitter.kernel.buffer(term.buffer)
    if buffer.dtype != torch.float32 and (buffer.dtype != torch.bfloat16 or copies.whole is not None):
        return None
    return _run_along(emitter, term.buffer, term.index, panel.k)


def rounded_row(emitter: Emitter, store: Store, n: Axis) -> str | None:
    """Where column `first_column` of a row goes that is stored in bfloat16, in one piece; None for any other store."""
    if emitter.kernel.buffer(store.buffer).dtype != torch.bfloat16:
        return None
    start = _run_along(emitter, store.buffer, store.index, n)
    return None if start is None else f"{start} + first_column"


def kept_rows(kernel: Kernel, rows: RowPart, part: MatmulPart) -> Contract | None:
    """The contract of `part` whose rows are what `rows` stores, so that they need not be computed twice; or None.

    A norm is often stored beside the product that reads it, for a sum behind that: whoever has the first columns of
    a block of rows then stores what it wrote for the product.
    """
    if part.choices or len(rows.stores) != 1 or len(rows.inner) != 1 or not part.n.extent.is_Integer:
        return None
    store, inner, axes = rows.stores[0], rows.inner[0], (*part.batch, *part.rows)
    buffer = kernel.buffer(store.buffer)
    row = (*(axis.symbol for axis in rows.grid), inner.symbol)
    if (
        {buffer.dtype, store.value.dtype} != {torch.float32}
        or store.index != row
        or not inner.extent.is_Integer
    ):
        return None
    wanted = _as_text(kernel, rows.grid, inner, rows.binds, store.value)
    for bind in part.contracts:
        contract = bind.term
        if (
            isinstance(contract, Contract)
            and contract.dtype == torch.float32
            and contract.a.dtype == torch.float32
        ):
            binds = _read_binds(part.row_binds, contract.a)
            if not isinstance(contract.a, Load) and wanted == _as_text(
                kernel, axes, contract.k, binds, contract.a
            ):
                return contract
    return None


def keep_row(emitter: Emitter, panel: Panel, axes: Sequence[Axis], store: Store, is_narrow: bool) -> str:
    """Add, and give, the statement that stores the row in the panel: by the thread that has its first columns."""
    index = (*(axis.symbol for axis in axes), sympy.Integer(0))
    place = emitter.offset(index, emitter.kernel.buffer(store.buffer).shape)
    row = f"{panel.name} + {'panel_row' if is_narrow else 'r'} * {panel.stride}"
    count = f"4 * {unwrapped(emitter.index(panel.k.extent))}"
    name = emitter.names.buffers[store.buffer]
    line = f"if (first_column == 0) __builtin_memcpy({name} + {place}, {row}, {count});"
    emitter.line(line)
    return line


def _read_binds(binds: Sequence[Bind], term: Term) -> tuple[Bind, ...]:
    """Those that the term reads, and that these read."""
    roots, read = [term], []
    for bind in reversed(binds):
        if any(isinstance(node, Ref) and node.name == bind.name for root in roots for node in walk(root)):
            roots.append(bind.term)
            read.append(bind)
    return tuple(reversed(read))


def _as_text(
    kernel: Kernel, grid: tuple[Axis, ...], inner: Axis, binds: tuple[Bind, ...], value: Term
) -> str:
    """What is computed for every point of `grid` and `inner`, with numbers for the names of axes and binds."""
    part = RowPart(grid, (inner,), binds, (Store(kernel.buffers[0].name, (), value),))
    roots = (*(bind.term for bind in binds), value)
    folds = {axis.name for root in roots for term in walk(root) for axis in bound_axes(term)}
    names = folds | {axis.name for axis in (*grid, inner)} | {bind.name for bind in binds}
    return numbered_names([fingerprint(replace(kernel, parts=(part,)), {})], names)


def _run_along(emitter: Emitter, name: str, index: Sequence[Expr], axis: Axis) -> str | None:
    """The address of element 0 of a run of elements along `axis`; None if they do not lie one after the other."""
    shape = emitter.kernel.buffer(name).shape
    if axis.symbol in sympy.expand(linearize(index, shape) - axis.symbol).free_symbols:
        return None
    start = tuple(sympy.sympify(expr).subs(axis.symbol, 0) for expr in index)
    return f"{emitter.names.buffers[name]} + {emitter.offset(start, shape)}"
