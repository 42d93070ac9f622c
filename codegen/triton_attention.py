"""AttentionPart as Triton source: a block of queries of one head against all keys, with a running softmax.

Per block of keys: scores, cap, masks; the running maximum `top` and sum `total` are updated and what was summed so
far is scaled by exp(old top - new top) (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).  Key blocks
that causal or window masks hide from the whole block of queries are skipped.  A query that sees no key gives 0.
Over a cache, triton_cached.py says where the keys are and who sees them.
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
from torchweld.codegen.triton_matmul import as_dot_operand, ceil_div, dot_dtype, operand_frame, tile_operand
from torchweld.codegen.triton_schedule import padded_features
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


def attend_of(part: AttentionPart) -> Attend:
    """The Attend that an AttentionPart binds."""
    if not isinstance(part.attend.term, Attend):
        raise TypeError(f"bind {part.attend.name!r} of an AttentionPart: expected an Attend")
    return part.attend.term


def print_attention(printer: FoldPrinter, part: AttentionPart, schedule: Schedule) -> None:
    """The body of a function that runs program `pid` of an AttentionPart."""
    writer, attend = printer.writer, attend_of(part)
    printer.frame = Frame(2)
    t_tiles = writer.let("query_tiles", ceil_div(printer, (part.t,), schedule.block_rows))
    if part.batch:
        group, _ = tile_group(printer, part.batch, 1, f"(pid // {t_tiles.operand})", 0, "batch")
        printer.frame = printer.frame.with_group(group)
    tile = writer.let("query_tile", Value(f"pid % {t_tiles.operand}", is_atom=False))
    t, t_dims = tile_group(printer, (part.t,), schedule.block_rows, tile.text, 0, part.t.name)
    queries = printer.frame.with_group(t, **t_dims)
    d_block, f_block = padded_features(attend.d), padded_features(part.feature)
    d = writer.let(attend.d.name, Value(f"tl.arange(0, {d_block})"))
    printer.frame = queries
    with printer.within(operand_frame(printer, queries, attend.d, d, 1, d_block)):
        q = tile_operand(printer, attend.q, attend.d, f"[{schedule.block_rows}, {d_block}]")
        q = writer.let("q", q)
    features = tile_group(printer, (part.feature,), f_block, "0", 1, part.feature.name)
    cached = begin_keys(printer, part, attend, schedule) if attend.past is not None else None
    _print_keys(printer, part, _Tiles(queries, d, q, features, cached), schedule)
    with printer.within(queries.with_group(features[0], **features[1])):
        for store in part.stores:
            print_store(printer, store)


def _print_keys(printer: FoldPrinter, part: AttentionPart, tiles: _Tiles, schedule: Schedule) -> None:
    """The loop over key blocks; binds the attend's name to the normalized sum."""
    writer, attend = printer.writer, attend_of(part)
    rows, f_block = schedule.block_rows, padded_features(part.feature)
    names = {hint: writer.names.fresh(hint) for hint in ("top", "total", "mixed", "start")}
    cached = tiles.cached
    first, last = (cached.first, cached.last) if cached else _visible_blocks(printer, part, schedule)
    writer.line(f'{names["top"]} = tl.full([{rows}, 1], float("-inf"), tl.float32)')
    writer.line(f"{names['total']} = tl.zeros([{rows}, 1], tl.float32)")
    writer.line(f"{names['mixed']} = tl.zeros([{rows}, {f_block}], tl.float32)")
    with printer.captured() as lines:
        number = f"{names['start']} + tl.arange(0, {schedule.block_k})"
        s = writer.let(attend.s.name, Value(f"({number}).to(tl.int64)" if cached else number))
        scores = _print_scores(printer, attend, tiles, s, schedule)
        _print_update(printer, part, tiles, s, scores, names, schedule)
    writer.block(f"for {names['start']} in range({first}, {last}, {schedule.block_k}):", lines)
    dims = tiles.queries.groups[-1].flat.dims | tiles.features[0].flat.dims
    total = f"tl.where({names['total']} == 0.0, 1.0, {names['total']})"
    result = Value(f"{names['mixed']} / {total}", dims, is_atom=False)
    printer.refs[part.attend.name] = writer.let(part.attend.name, result)


def _visible_blocks(printer: FoldPrinter, part: AttentionPart, schedule: Schedule) -> tuple[str, str]:
    """The first key of the loop and its end, by the positions that the block of queries can see."""
    attend, writer = attend_of(part), printer.writer
    keys = printer.index(attend.s.extent)
    shift = sympy.expand(attend.t - part.t.symbol)
    if attend.mask_kind == "none" or part.t.symbol in shift.free_symbols:
        return "0", keys.text
    offset = printer.index(sympy.expand(shift + attend.s.extent - attend.t_extent))
    tile = f"query_tile * {schedule.block_rows}"
    front = tile if offset.text == "0" else f"{tile} + {offset.operand}"
    last = writer.let("last", Value(f"tl.minimum({keys.text}, {front} + {schedule.block_rows})"))
    if attend.mask_kind == "causal":
        return "0", last.text
    oldest = f"tl.maximum({front} - {attend.window - 1}, 0) // {schedule.block_k} * {schedule.block_k}"
    return writer.let("first", Value(oldest)).text, last.text


def _print_scores(printer: FoldPrinter, attend: Attend, tiles: _Tiles, s: Value, schedule: Schedule) -> Value:
    """Scores of a block of keys, hidden ones at -inf."""
    writer, d_block = printer.writer, padded_features(attend.d)
    keys_across = tiles.keys(printer, printer.frame, attend, s, 1, schedule.block_k)
    key_frame = operand_frame(printer, keys_across, attend.d, tiles.d, 0, d_block)
    with printer.within(key_frame):
        k = tile_operand(printer, attend.k, attend.d, f"[{d_block}, {schedule.block_k}]")
        k = writer.let("k", k)
    dtype = dot_dtype(attend.q, attend.k)
    dot = f'tl.dot({as_dot_operand(tiles.q, dtype)}, {as_dot_operand(k, dtype)}, input_precision="ieee")'
    frame = tiles.keys(printer, tiles.queries, attend, s, 1, schedule.block_k)
    dims = frozenset(frame.dims)
    scores = writer.let("scores", Value(f"{dot} * {attend.scale!r}", dims, is_atom=False))
    if attend.soft_cap > 0:
        writer.helpers["tanh"] = None
        cap = repr(attend.soft_cap)
        scores = writer.let("capped", Value(f"{cap} * tanh({scores.text} / {cap})", dims, is_atom=False))
    if tiles.cached is not None:
        return _hide_cached(printer, attend, tiles.cached, frame, scores, s, schedule)
    with printer.within(frame):
        if attend.mask is not None and attend.mask.dtype != torch.bool:
            scores = writer.let("biased", Value(f"{scores.text} + {printer.term(attend.mask).operand}", dims))
        visible = _visible(printer, attend, frame)
    if not visible:
        return scores
    return writer.let("masked", Value(f'tl.where({visible}, {scores.text}, float("-inf"))', dims))


def _hide_cached(
    printer: FoldPrinter, attend: Attend, cached: CachedKeys, frame: Frame, scores: Value, s: Value, schedule: Schedule
) -> Value:  # fmt: skip
    """Scores of a block of a cache's keys, hidden ones at -inf; masks are read at the keys' positions."""
    writer, dims = printer.writer, frozenset(frame.dims)
    position = print_positions(printer, frame, attend, cached, s, schedule)
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
    printer: FoldPrinter, part: AttentionPart, tiles: _Tiles, s: Value, scores: Value, names: dict[str, str],
    schedule: Schedule,
) -> None:  # fmt: skip
    """One step of the running softmax."""
    writer, attend = printer.writer, attend_of(part)
    top, total, mixed = names["top"], names["total"], names["mixed"]
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
