"""RowPart as Triton source: one program per block of rows.

A row of known width up to MAX_TILE is one padded tile, loaded once and used by every fold and store of that width;
wider rows are walked in blocks.  Parts without columns put their points along the tile instead.
"""

from __future__ import annotations

from torchweld.codegen.ir import RowPart, Schedule, part_terms
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_frame import Frame
from torchweld.codegen.triton_schedule import column_block, is_single_tile, width
from torchweld.codegen.triton_store import print_store, tile_group
from torchweld.graph.terms import Contract, Fold


def has_columns(part: RowPart) -> bool:
    """Whether the part loops over anything besides its rows."""
    return bool(part.inner) or any(isinstance(t, Fold | Contract) for t in part_terms(part))


def print_rows(printer: FoldPrinter, part: RowPart, schedule: Schedule) -> None:
    """The body of a function that runs program `pid` of a RowPart."""
    rows = schedule.block_rows
    printer.frame = Frame(2 if has_columns(part) and rows > 1 else 1)
    group, dims = tile_group(printer, part.grid, rows, "pid", 0, "row")
    printer.frame = printer.frame.with_group(group, **dims)
    for bind in part.binds:
        value = printer.term(bind.term)
        printer.refs[bind.name] = printer.writer.let(bind.name, value)
    if not part.inner:
        for store in part.stores:
            print_store(printer, store)
    elif is_single_tile(part.inner):
        frame, _, _ = printer.columns(part.inner)
        with printer.within(frame):
            for store in part.stores:
                print_store(printer, store)
    else:
        _print_blocks(printer, part)


def _print_blocks(printer: FoldPrinter, part: RowPart) -> None:
    """Stores in a loop over column blocks."""
    start = printer.writer.names.fresh("start")
    extent = printer.index(width(part.inner))
    with printer.captured() as lines:
        frame, _, _ = printer.columns(part.inner, start)
        with printer.within(frame):
            for store in part.stores:
                print_store(printer, store)
    printer.writer.block(f"for {start} in range(0, {extent.text}, {column_block(part.inner)}):", lines)
