"""MatmulPart as Triton source: one program per BLOCK_ROWS x BLOCK_N tile of the output.

Row binds (a norm's factor) are computed first, per row of the tile; the A operand is computed in registers from its
prologue; stored weights are decoded in registers; contracts over the same k share one loop, each with its own
accumulator; the epilogue works on the accumulators.  A tile of one row multiplies and adds without tl.dot.

Products are float32 ("ieee"): no tensor cores for float32 data.  Where both operands are 16-bit values as they were
stored, they go to tl.dot as they are: the product of two such numbers is exact in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from torchweld.codegen.ir import Bind, MatmulPart, Schedule
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_frame import Dim, Frame, Group
from torchweld.codegen.triton_schedule import is_whole_blocks, width
from torchweld.codegen.triton_store import print_store, tile_group
from torchweld.codegen.triton_text import Value, is_half
from torchweld.graph.terms import Axis, Contract, Load, Op, Term


def print_matmul(printer: FoldPrinter, part: MatmulPart, schedule: Schedule) -> None:
    """The body of a function that runs program `pid` of a MatmulPart; the tiles of one column are neighbours."""
    writer = printer.writer
    m_tiles = row_tiles(printer, part, schedule)
    n_tiles = ceil_div(printer, (part.n,), schedule.block_n)
    batch, column = "", f"(pid // {m_tiles.operand})"
    if part.batch:
        n_tiles = writer.let("n_tiles", n_tiles)
        batch = f"(pid // ({m_tiles.operand} * {n_tiles.operand}))"
        column = f"(pid // {m_tiles.operand} % {n_tiles.operand})"
    enter_rows(printer, part, schedule, batch, m_tiles)
    n, n_dims = tile_group(printer, (part.n,), schedule.block_n, column, 1, part.n.name)
    print_products(printer, part, (n, n_dims), schedule)
    with printer.within(printer.frame.with_group(n, **n_dims)):
        for store in part.stores:
            print_store(printer, store)


def row_tiles(printer: FoldPrinter, part: MatmulPart, schedule: Schedule) -> Value:
    """A frame for tiles, and the number of tiles of rows as a variable."""
    printer.frame = Frame(2)
    return printer.writer.let("row_tiles", ceil_div(printer, part.rows, schedule.block_rows))


def enter_rows(
    printer: FoldPrinter, part: MatmulPart, schedule: Schedule, batch: str, m_tiles: Value
) -> None:
    """The frame with the rows of program `pid`, and what is bound once per row; `batch` numbers the batch."""
    if part.batch:
        group, _ = tile_group(printer, part.batch, 1, batch, 0, "batch")
        printer.frame = printer.frame.with_group(group)
    rows, dims = tile_group(printer, part.rows, schedule.block_rows, f"(pid % {m_tiles.operand})", 0, "row")
    printer.frame = printer.frame.with_group(rows, **dims)
    for bind in part.row_binds:
        printer.refs[bind.name] = printer.writer.let(bind.name, printer.term(bind.term))


def print_products(
    printer: FoldPrinter, part: MatmulPart, n: tuple[Group, dict[str, Dim]], schedule: Schedule
) -> None:
    """The accumulators of one tile: the rows of the frame by the columns `n`; they become refs."""
    for contracts in _same_k(part.contracts):
        _print_contracts(printer, contracts, n, schedule)


def ceil_div(printer: FoldPrinter, axes: Sequence[Axis], block: int) -> Value:
    """Number of blocks over the flattened `axes`."""
    extent = width(tuple(axes))
    if extent.is_Integer:
        return Value(str(-(-int(extent) // block)))
    return Value(f"tl.cdiv({printer.index(extent).text}, {block})")


def _same_k(contracts: Sequence[Bind]) -> list[list[Bind]]:
    """Contracts grouped by the extent of k, in order."""
    groups: dict[sympy.Expr, list[Bind]] = {}
    for bind in contracts:
        groups.setdefault(contract_of(bind).k.extent, []).append(bind)
    return list(groups.values())


def contract_of(bind: Bind) -> Contract:
    """The Contract that a MatmulPart binds."""
    if not isinstance(bind.term, Contract):
        raise TypeError(
            f"bind {bind.name!r} of a MatmulPart: expected a Contract, got {type(bind.term).__name__}"
        )
    return bind.term


def is_stored_half(term: Term) -> bool:
    """A 16-bit value as it was loaded, widened or not."""
    if isinstance(term, Op) and term.name == "cast" and term.dtype == torch.float32:
        return is_stored_half(term.args[0])
    return isinstance(term, Load) and is_half(term.dtype)


def dot_dtype(a: Term, b: Term) -> str:
    """What the operands are given to tl.dot as."""
    if is_stored_half(a) and is_stored_half(b):
        return "DOT_DTYPE"
    return "tl.float64" if torch.float64 in (a.dtype, b.dtype) else "tl.float32"


def _print_contracts(
    printer: FoldPrinter, binds: Sequence[Bind], n: tuple[Group, dict[str, Dim]], schedule: Schedule
) -> None:
    """One loop over k for all `binds`; their accumulators become refs."""
    writer, block = printer.writer, schedule.block_k
    first = contract_of(binds[0]).k
    start = writer.names.fresh("start")
    accumulators = {bind.name: writer.names.fresh(bind.name) for bind in binds}
    dims = frozenset(n[1]) | printer.frame.groups[-1].flat.dims
    with printer.captured() as lines:
        k = writer.let(first.name, Value(f"{start} + tl.arange(0, {block})"))
        for bind in binds:
            _print_step(printer, bind, accumulators[bind.name], k, n, schedule)
    shape = f"[{schedule.block_rows}, {schedule.block_n}]"
    for bind in binds:
        dtype = "tl.float64" if bind.term.dtype == torch.float64 else "tl.float32"
        writer.line(f"{accumulators[bind.name]} = tl.zeros({shape}, {dtype})")
        printer.refs[bind.name] = Value(accumulators[bind.name], dims)
    writer.block(f"for {start} in range(0, {printer.index(first.extent).text}, {block}):", lines)


def _print_step(
    printer: FoldPrinter,
    bind: Bind,
    accumulator: str,
    k: Value,
    n: tuple[Group, dict[str, Dim]],
    schedule: Schedule,
) -> None:
    """One block of k added to one accumulator."""
    contract, writer = contract_of(bind), printer.writer
    is_row = schedule.block_rows == 1
    down = operand_frame(printer, printer.frame, contract.k, k, 0, schedule.block_k)
    across = down if is_row else operand_frame(printer, printer.frame, contract.k, k, 1, schedule.block_k)
    dtype = dot_dtype(contract.a, contract.b)
    a_shape = f"[{schedule.block_k}, 1]" if is_row else f"[{schedule.block_rows}, {schedule.block_k}]"
    with printer.within(across):
        a = tile_operand(printer, contract.a, contract.k, a_shape)
    with printer.within(down.with_group(n[0], **n[1])):
        b = tile_operand(printer, contract.b, contract.k, f"[{schedule.block_k}, {schedule.block_n}]")
    if is_row:
        product = f"tl.sum({a.operand} * {b.operand}, axis=0, keep_dims=True)"
        writer.line(f"{accumulator} += {product}")
        return
    a_text, b_text = (as_dot_operand(v, dtype) for v in (a, b))
    out = ", out_dtype=tl.float64" if dtype == "tl.float64" else ""
    writer.line(f'{accumulator} = tl.dot({a_text}, {b_text}, {accumulator}, input_precision="ieee"{out})')


def as_dot_operand(value: Value, dtype: str) -> str:
    """A tile as an operand of tl.dot."""
    return value.text if dtype == "tl.float32" else f"{value.operand}.to({dtype})"


def operand_frame(
    printer: FoldPrinter, frame: Frame, axis: Axis, flat: Value, place: int, block: int
) -> Frame:
    """`frame` with the summed axis down the rows (place 0) or across the columns (place 1)."""
    side = "[:, None]" if place == 0 else "[None, :]"
    hint = f"{flat.text}_{'down' if place == 0 else 'across'}"
    dim = f"{flat.text}{side}"
    variable = printer.writer.let(hint, Value(f"{flat.text}{side}", frozenset({dim})))
    extent = printer.index(axis.extent)
    mask = None if is_whole_blocks((axis,), block) else f"{variable.text} < {extent.operand}"
    return frame.with_group(Group((axis,), variable), **{dim: Dim(place, block, mask)})


def tile_operand(printer: FoldPrinter, term: Term, axis: Axis, shape: str) -> Value:
    """An operand of full shape whose lanes beyond the summed axis are 0."""
    found = printer.frame.group_of(axis.symbol)
    if found is None:
        raise KeyError(f"summed axis {axis.name} is not in the frame")
    dim = next(iter(found[0].flat.dims))
    mask = printer.frame.dims[dim].mask
    value = printer.term(term)
    if mask is not None and not printer.is_zero_when_masked(term, dim):
        value = Value(f"tl.where({mask}, {value.text}, 0.0)", value.dims | {dim})
    if printer.frame.shape(value.dims) != shape:
        text = f"tl.full({shape}, {value.text}, tl.float32)" if not value.dims else value.text
        value = Value(
            f"tl.broadcast_to({text}, {shape})" if value.dims else text, frozenset(printer.frame.dims)
        )
    return printer.writer.let("operand", value)
