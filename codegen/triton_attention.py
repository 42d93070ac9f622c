"""AttentionPart as Triton source: a block of rows against all keys that one of them sees, with a running softmax.

A row is a query of one head; the heads that read one key head stand in one block (triton_heads.py).
Per block of keys: scores, cap, masks; the running maximum `top` and sum `total` are updated and what was summed so
far is scaled by exp(old top - new top) (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).  Key blocks
that causal or window masks hide from the whole block of queries are skipped.  A query that sees no key gives 0.
Over a cache, triton_cached.py says where the keys are and who sees them; triton_splits.py lets several programs share
the keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from torchweld.codegen.ir import AttentionPart, Schedule
from torchweld.codegen.triton_cached import (
    CachedKeys,
    begin_keys,
    print_positions,
    slot_frame,
    visible_keys,
)
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_frame import Dim, Frame, Group
from torchweld.codegen.triton_heads import HeadGroups, attend_of, group_heads
from torchweld.codegen.triton_matmul import as_dot_operand, ceil_div, dot_dtype, operand_frame, tile_operand
from torchweld.codegen.triton_schedule import padded_features
from torchweld.codegen.triton_splits import SplitArguments, State, fresh_state, print_empty, print_splits
from torchweld.codegen.triton_store import print_store, tile_group
from torchweld.codegen.triton_terms import all_of
from torchweld.codegen.triton_text import Value
from torchweld.graph.terms import Attend


@dataclass(frozen=True)
class _Tiles:
    """The frames' building blocks: queries down the rows, and the flat variables of d and the features.

    cached: what is known of the keys of a cache; None where the keys are all of s.
    """

    queries: Frame
    d: Value
    q: Value
    features: tuple[Group, dict[str, Dim]]
    cached: CachedKeys | None

    def keys(
        self, printer: FoldPrinter, frame: Frame, attend: Attend, s: Value, place: int, block: int
    ) -> Frame:
        """`frame` with a block of keys down the rows (place 0) or across the columns (place 1)."""
        if self.cached is None:
            return operand_frame(printer, frame, attend.s, s, place, block)
        return slot_frame(printer, frame, attend, self.cached, s, place, block)


ATTENTION_NAMES = ("query_tile", "new_top", "base", "kept", "weights")
"""Variables that are printed as they are."""


def print_attention(
    printer: FoldPrinter, part: AttentionPart, schedule: Schedule, arguments: SplitArguments | None
) -> None:
    """The body of a function that runs program `pid` of an AttentionPart; `arguments` where its keys are split."""
    writer, heads = printer.writer, group_heads(part)
    if heads.members is not None:
        printer.count_uses([heads.part.attend.term, *(store.value for store in heads.part.stores)])
    part, attend = heads.part, attend_of(heads.part)
    printer.frame = Frame(2)
    _print_header(printer, heads, schedule)
    if arguments is not None:
        writer.line(f"split, tile = pid % {arguments.splits}, pid // {arguments.splits}")
    program = "pid" if arguments is None else "tile"
    tiles_of_rows = writer.let("query_tiles", ceil_div(printer, heads.rows, schedule.block_rows))
    if part.batch:
        group, _ = tile_group(printer, part.batch, 1, f"({program} // {tiles_of_rows.operand})", 0, "batch")
        printer.frame = printer.frame.with_group(group)
    writer.line(f"query_tile = {program} % {tiles_of_rows.operand}")
    hint = part.t.name if heads.members is None else "row"
    rows, row_dims = tile_group(printer, heads.rows, schedule.block_rows, "query_tile", 0, hint)
    queries = printer.frame.with_group(rows, **row_dims)
    d_block, f_block = padded_features(attend.d), padded_features(part.feature)
    d = writer.let(attend.d.name, Value(f"tl.arange(0, {d_block})"))
    with printer.within(queries), printer.within(operand_frame(printer, queries, attend.d, d, 1, d_block)):
        q = tile_operand(printer, attend.q, attend.d, f"[{schedule.block_rows}, {d_block}]")
        q = writer.let("q", q)
    features = tile_group(printer, (part.feature,), f_block, "0", 1, part.feature.name)
    cached = None
    if attend.past is not None:
        with printer.within(queries):
            cached = begin_keys(printer, heads, schedule)
    whole = _print_keys(printer, heads, _Tiles(queries, d, q, features, cached), schedule, arguments)
    with printer.captured() as lines:
        _print_result(printer, part, whole, queries, features)
    if arguments is None:
        writer.lines += lines
    else:
        writer.block("if is_last:", lines)


def _print_header(printer: FoldPrinter, heads: HeadGroups, schedule: Schedule) -> None:
    """What a program does, as comments."""
    rows = f"{schedule.block_rows} rows"
    if heads.members is not None:
        rows += f" ({heads.share} heads that read one key head, for each query)"
    lines = [f"# One program per tile of {rows}."]
    if schedule.split_keys:
        lines = [
            f"# One program per tile of {rows} and split of {schedule.split_keys} keys;",
            "# the last program of a tile to finish joins the splits, in their order. Many tiles: splits is 1, and one",
            "# program takes all splits of its tile, with the same result.",
        ]
    printer.writer.lines += lines


def _print_result(
    printer: FoldPrinter, part: AttentionPart, state: State, queries: Frame, features: tuple[Group, dict[str, Dim]]
) -> None:  # fmt: skip
    """The normalized sum, bound to the attend's name, and the stores."""
    group, dims = features
    total = f"tl.where({state.total} == 0.0, 1.0, {state.total})"
    spanned = queries.groups[-1].flat.dims | group.flat.dims
    result = Value(f"{state.mixed} / {total}", spanned, is_atom=False)
    printer.refs[part.attend.name] = printer.writer.let(part.attend.name, result)
    with printer.within(queries.with_group(group, **dims)):
        for store in part.stores:
            print_store(printer, store)


def _print_keys(
    printer: FoldPrinter, heads: HeadGroups, tiles: _Tiles, schedule: Schedule, arguments: SplitArguments | None
) -> State:  # fmt: skip
    """The loop over key blocks; the state of all that the tile's rows see."""
    cached, part = tiles.cached, heads.part
    first, last = (cached.first, cached.last) if cached else _visible_blocks(printer, heads, schedule)
    with printer.within(tiles.queries):

        def start(state: State) -> None:
            _print_start(printer, part, state, schedule)

        def keys(state: State, begin: str, end: str) -> None:
            _print_blocks(printer, part, tiles, state, (begin, end), schedule)

        if arguments is not None:
            return print_splits(printer, part, schedule, arguments, (first, last), start, keys)
        state = fresh_state(printer)
        start(state)
        keys(state, first, last)
        return state


def _print_blocks(
    printer: FoldPrinter, part: AttentionPart, tiles: _Tiles, state: State, keys: tuple[str, str], schedule: Schedule
) -> None:  # fmt: skip
    """The loop that adds the keys from one to another to a state."""
    writer, attend = printer.writer, attend_of(part)
    start = writer.names.fresh("start")
    with printer.captured() as lines:
        number = f"{start} + tl.arange(0, {schedule.block_k})"
        s = writer.let(attend.s.name, Value(f"({number}).to(tl.int64)" if tiles.cached else number))
        frame = tiles.keys(printer, tiles.queries, attend, s, 1, schedule.block_k)
        position = None
        if tiles.cached is not None:  # in front of the product, whose operands need the registers
            position = print_positions(printer, frame, attend, tiles.cached, s, start, schedule)
        scores = _print_scores(printer, attend, tiles, s, schedule)
        scores = _hide(printer, attend, tiles.cached, frame, scores, position)
        _print_update(printer, part, tiles, s, scores, state, schedule)
    writer.block(f"for {start} in range({keys[0]}, {keys[1]}, {schedule.block_k}):", lines)


def _print_start(printer: FoldPrinter, part: AttentionPart, state: State, schedule: Schedule) -> None:
    """The state before any key."""
    sinks = attend_of(part).sinks
    sink = "" if sinks is None else printer.term(sinks).operand
    print_empty(printer, state, schedule, padded_features(part.feature), sink)


def _visible_blocks(printer: FoldPrinter, heads: HeadGroups, schedule: Schedule) -> tuple[str, str]:
    """The first key of the loop and its end, by the positions that the block of queries can see."""
    part, attend, writer = heads.part, attend_of(heads.part), printer.writer
    keys = printer.index(attend.s.extent)
    shift = sympy.expand(attend.t - part.t.symbol)
    if attend.mask_kind == "none" or part.t.symbol in shift.free_symbols:
        return "0", keys.text
    offset = printer.index(sympy.expand(shift + attend.s.extent - attend.t_extent))
    front = heads.first_query(schedule.block_rows)
    front = front if offset.text == "0" else f"{front} + {offset.operand}"
    end = heads.end_query(schedule.block_rows, front)
    last = writer.let("last", Value(f"tl.minimum({keys.text}, {end})"))
    if attend.mask_kind == "causal":
        return "0", last.text
    oldest = f"tl.maximum({front} - {attend.window - 1}, 0) // {schedule.block_k} * {schedule.block_k}"
    return writer.let("first", Value(oldest)).text, last.text


def _print_scores(printer: FoldPrinter, attend: Attend, tiles: _Tiles, s: Value, schedule: Schedule) -> Value:
    """Scores of a block of keys: scaled and capped."""
    writer, d_block = printer.writer, padded_features(attend.d)
    keys_across = tiles.keys(printer, printer.frame, attend, s, 1, schedule.block_k)
    key_frame = operand_frame(printer, keys_across, attend.d, tiles.d, 0, d_block)
    with printer.within(key_frame):
        k = tile_operand(printer, attend.k, attend.d, f"[{d_block}, {schedule.block_k}]")
        k = writer.let("k", k)
    dtype = dot_dtype(attend.q, attend.k)
    dot = f'tl.dot({as_dot_operand(tiles.q, dtype)}, {as_dot_operand(k, dtype)}, input_precision="ieee")'
    dims = frozenset(tiles.queries.groups[-1].flat.dims | keys_across.groups[-1].flat.dims)
    scores = writer.let("scores", Value(f"{dot} * {attend.scale!r}", dims, is_atom=False))
    if attend.soft_cap > 0:
        writer.helpers["tanh"] = None
        cap = repr(attend.soft_cap)
        scores = writer.let("capped", Value(f"{cap} * tanh({scores.text} / {cap})", dims, is_atom=False))
    return scores


def _hide(
    printer: FoldPrinter, attend: Attend, cached: CachedKeys | None, frame: Frame, scores: Value, position: Value | None
) -> Value:  # fmt: skip
    """Scores of a block of keys, hidden ones at -inf; over a cache, at the keys' positions."""
    if cached is not None and position is not None:
        return _hide_cached(printer, attend, cached, frame, scores, position)
    writer, dims = printer.writer, frozenset(frame.dims)
    with printer.within(frame):
        if attend.mask is not None and attend.mask.dtype != torch.bool:
            scores = writer.let("biased", Value(f"{scores.text} + {printer.term(attend.mask).operand}", dims))
        visible = _visible(printer, attend, frame)
    if not visible:
        return scores
    return writer.let("masked", Value(f'tl.where({visible}, {scores.text}, float("-inf"))', dims))


def _hide_cached(
    printer: FoldPrinter, attend: Attend, cached: CachedKeys, frame: Frame, scores: Value, position: Value
) -> Value:
    """Scores of a block of a cache's keys, hidden ones at -inf; masks are read at the keys' positions."""
    writer, dims = printer.writer, frozenset(frame.dims)
    visible = writer.let("visible", Value(all_of(visible_keys(attend, cached, position)), dims))
    if attend.mask is not None:
        with printer.within(frame.with_value(attend.s.name, position)), printer.guarded(visible):
            mask = printer.term(attend.mask)
        if attend.mask.dtype == torch.bool:
            visible = writer.let("unmasked", Value(f"{visible.text} & {mask.operand}", dims))
        else:
            scores = writer.let("biased", Value(f"{scores.text} + {mask.operand}", dims))
    return writer.let("masked", Value(f'tl.where({visible.text}, {scores.text}, float("-inf"))', dims))


def _visible(printer: FoldPrinter, attend: Attend, frame: Frame) -> str:
    """The condition under which a key counts: it exists, position and tensor mask let it through."""
    key = printer.symbol(attend.s.symbol)
    conditions = frame.masks(key.dims)
    if attend.mask_kind != "none":
        query = printer.index(sympy.expand(attend.t + attend.s.extent - attend.t_extent))
        query = printer.writer.let("newest", query)
        conditions.append(f"{key.text} <= {query.text}")
        if attend.mask_kind == "window":
            conditions.append(f"{key.text} > {query.text} - {attend.window}")
    if attend.mask is not None and attend.mask.dtype == torch.bool:
        conditions.append(printer.term(attend.mask).operand)
    return all_of(conditions) if conditions else ""


def _print_update(
    printer: FoldPrinter, part: AttentionPart, tiles: _Tiles, s: Value, scores: Value, state: State,
    schedule: Schedule,
) -> None:  # fmt: skip
    """One step of the running softmax."""
    writer, attend = printer.writer, attend_of(part)
    top, total, mixed = state.top, state.total, state.mixed
    frame = tiles.keys(printer, printer.frame, attend, s, 0, schedule.block_k)
    group, dims = tiles.features
    with printer.within(frame.with_group(group, **dims)):
        v = tile_operand(
            printer, attend.v, attend.s, f"[{schedule.block_k}, {padded_features(part.feature)}]"
        )
        v = writer.let("v", v)
    write = writer.line
    write(f"new_top = tl.maximum({top}, tl.max({scores.text}, axis=1, keep_dims=True))")
    write('base = tl.where(new_top == float("-inf"), 0.0, new_top)')
    write(f"kept = tl.exp({top} - base)")
    write(f"weights = tl.exp({scores.text} - base)")
    write(f"{total} = {total} * kept + tl.sum(weights, axis=1, keep_dims=True)")
    write(f'{mixed} = tl.dot(weights, {v.text}, {mixed} * kept, input_precision="ieee")')
    write(f"{top} = new_top")
