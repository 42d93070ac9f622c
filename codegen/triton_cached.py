"""The keys of a cached attention as Triton source: numbered from the oldest to the newest row, found through slots.

Number e is position e, in slot e mod capacity, for the text before the call; behind it come the new rows, past + i in
slot (past + i) mod capacity.  Without a tree their numbers are positions too.  In a tree, row i counts for a query only
if it is on the query's path, and stands at past + its depth there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchweld.codegen.ir import Schedule
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_frame import Dim, Frame, Group
from torchweld.codegen.triton_heads import HeadGroups, attend_of
from torchweld.codegen.triton_text import Value
from torchweld.graph.terms import Attend

_BEYOND = 1 << 40  # a position that no query reaches


@dataclass(frozen=True)
class CachedKeys:
    """What the loop over the keys needs to know, printed in front of it.

    past: rows before the call.  query: the positions of the tile's queries.  first, last: the numbers that the loop
    runs over.  oldest: the first number that a query of the tile can see.
    """

    past: Value
    query: Value
    first: str
    last: str
    oldest: Value


def begin_keys(printer: FoldPrinter, heads: HeadGroups, schedule: Schedule) -> CachedKeys:
    """Print what the loop over the keys needs; the frame is that of the queries."""
    attend, writer = attend_of(heads.part), printer.writer
    assert attend.past is not None
    past = writer.let("past", printer.term(attend.past))
    end = f"{past.operand} + {printer.index(attend.t_extent).operand}"
    front = past.operand
    if attend.path is None:
        front = f"{past.operand} + {heads.first_query(schedule.block_rows)}"
        end = f"tl.minimum({end}, {heads.end_query(schedule.block_rows, front)})"
        place = printer.index(attend.t)
        query = Value(f"{past.operand} + {place.operand}", place.dims)
    else:
        depth = _print_depths(printer, attend, schedule)
        query = Value(f"{past.operand} + {depth.operand}", depth.dims)
    query = writer.let("query", query)
    last = writer.let("last", Value(end)).text
    if attend.mask_kind != "window":
        return CachedKeys(past, query, "0", last, Value("0"))
    oldest = writer.let("oldest", Value(f"tl.maximum({front} - {attend.window - 1}, 0)"))
    first = writer.let("first", Value(f"{oldest.text} // {schedule.block_k} * {schedule.block_k}")).text
    return CachedKeys(past, query, first, last, oldest)


def _print_depths(printer: FoldPrinter, attend: Attend, schedule: Schedule) -> Value:
    """How many ancestors every query has."""
    assert attend.path is not None and attend.steps is not None
    writer = printer.writer
    depth, step = writer.names.fresh("depth"), writer.names.fresh("step")
    with (
        printer.captured() as lines,
        printer.within(printer.frame.with_value(attend.steps.name, Value(step))),
    ):
        ancestor = printer.term(attend.path)
        writer.line(f"{depth} += ({ancestor.text} >= 0).to(tl.int64)")
    writer.line(f"{depth} = tl.full([{schedule.block_rows}, 1], -1, tl.int64)")
    writer.block(f"for {step} in range(0, {printer.index(attend.steps.extent).text}):", lines)
    return Value(depth, ancestor.dims)


def slot_frame(
    printer: FoldPrinter,
    frame: Frame,
    attend: Attend,
    keys: CachedKeys,
    number: Value,
    place: int,
    block: int,
) -> Frame:
    """`frame` with the slots of the numbered keys down the rows (place 0) or across the columns (place 1)."""
    side, hint = ("[:, None]", "down") if place == 0 else ("[None, :]", "across")
    dim = f"{number.text}{side}"
    capacity = printer.index(attend.s.extent)
    slot = printer.writer.let(
        f"slot_{hint}", Value(f"({number.text} % {capacity.operand}){side}", frozenset({dim}))
    )
    inside = f"(({number.text} >= {keys.oldest.text}) & ({number.text} < {keys.last})){side}"
    known = printer.writer.let(f"known_{hint}", Value(inside, frozenset({dim})))
    return frame.with_group(Group((attend.s,), slot), **{dim: Dim(place, block, known.text)})


def print_positions(
    printer: FoldPrinter, frame: Frame, attend: Attend, keys: CachedKeys, number: Value, start: str, schedule: Schedule
) -> Value:  # fmt: skip
    """The position of every key for every query; beyond all positions where the query does not see the key.

    start: the first number of the block. Without a tree, a key's number is its position.
    """
    writer = printer.writer
    dims = frozenset(frame.dims)
    across = writer.let("number", Value(f"{number.text}[None, :]", frozenset({f"{number.text}[None, :]"})))
    if attend.path is None or attend.steps is None:
        return across
    position, step = writer.names.fresh("position"), writer.names.fresh("step")
    row = writer.let("new_row", Value(f"{across.text} - {keys.past.operand}", across.dims))
    old = f"tl.where({row.text} < 0, {across.text}, {_BEYOND})"
    writer.line(f"{position} = {old} + tl.zeros([{schedule.block_rows}, {schedule.block_k}], tl.int64)")
    with printer.captured() as lines, printer.within(frame.with_value(attend.steps.name, Value(step))):
        ancestor = printer.term(attend.path)
        found = f"({ancestor.text} == {row.text}) & ({row.text} >= 0)"
        writer.line(f"{position} = tl.where({found}, {keys.past.operand} + {step}, {position})")
    steps = printer.index(attend.steps.extent).text
    steps = f"tl.where({start} + {schedule.block_k} > {keys.past.operand}, {steps}, 0)"
    writer.block(f"for {step} in range(0, {steps}):  # none where no key of the block is new", lines)
    return Value(position, dims)


def visible_keys(attend: Attend, keys: CachedKeys, position: Value) -> list[str]:
    """The conditions under which a key at `position` is seen."""
    conditions = [f"{position.text} <= {keys.query.text}"]
    if attend.mask_kind == "window":
        conditions.append(f"{position.text} > {keys.query.text} - {attend.window}")
    return conditions
