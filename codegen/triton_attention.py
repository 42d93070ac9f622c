"""AttentionPart as Triton source: a block of queries of one head against all keys, with a running softmax.

Per block of keys: scores, cap, masks; the running maximum `top` and sum `total` are updated and what was summed so
far is scaled by exp(old top - new top) (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022).  Key blocks
that causal or window masks hide from the whole block of queries are skipped.  A query that sees no key gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from torchweld.codegen.ir import AttentionPart, Schedule
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
    """The frames' building blocks: queries down the rows, and the flat variables of d and the features."""

    queries: Frame
    d: Value
    q: Value
    features: tuple[Group, dict[str, Dim]]


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
    _print_keys(printer, part, _Tiles(queries, d, q, features), schedule)
    with printer.within(queries.with_group(features[0], **features[1])):
        for store in part.stores:
            print_store(printer, store)


def _print_keys(printer: FoldPrinter, part: AttentionPart, tiles: _Tiles, schedule: Schedule) -> None:
    """The loop over key blocks; binds the attend's name to the normalized sum."""
    writer, attend = printer.writer, attend_of(part)
    rows, f_block = schedule.block_rows, padded_features(part.feature)
    names = {hint: writer.names.fresh(hint) for hint in ("top", "total", "mixed", "start")}
    first, last = _visible_blocks(printer, part, schedule)
    writer.line(f'{names["top"]} = tl.full([{rows}, 1], float("-inf"), tl.float32)')
    writer.line(f"{names['total']} = tl.zeros([{rows}, 1], tl.float32)")
    writer.line(f"{names['mixed']} = tl.zeros([{rows}, {f_block}], tl.float32)")
    with printer.captured() as lines:
        s = writer.let(attend.s.name, Value(f"{names['start']} + tl.arange(0, {schedule.block_k})"))
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
    keys_across = operand_frame(printer, printer.frame, attend.s, s, 1, schedule.block_k)
    key_frame = operand_frame(printer, keys_across, attend.d, tiles.d, 0, d_block)
    with printer.within(key_frame):
        k = tile_operand(printer, attend.k, attend.d, f"[{d_block}, {schedule.block_k}]")
        k = writer.let("k", k)
    dtype = dot_dtype(attend.q, attend.k)
    dot = f'tl.dot({as_dot_operand(tiles.q, dtype)}, {as_dot_operand(k, dtype)}, input_precision="ieee")'
    frame = operand_frame(printer, tiles.queries, attend.s, s, 1, schedule.block_k)
    dims = frozenset(frame.dims)
    scores = writer.let("scores", Value(f"{dot} * {attend.scale!r}", dims, is_atom=False))
    if attend.soft_cap > 0:
        writer.helpers["tanh"] = None
        cap = repr(attend.soft_cap)
        scores = writer.let("capped", Value(f"{cap} * tanh({scores.text} / {cap})", dims, is_atom=False))
    with printer.within(frame):
        if attend.mask is not None and attend.mask.dtype != torch.bool:
            scores = writer.let("biased", Value(f"{scores.text} + {printer.term(attend.mask).operand}", dims))
        visible = _visible(printer, attend, frame)
    if not visible:
        return scores
    return writer.let("masked", Value(f'tl.where({visible}, {scores.text}, float("-inf"))', dims))


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
    frame = operand_frame(printer, printer.frame, attend.s, s, 0, schedule.block_k)
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
