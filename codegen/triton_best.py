"""Searching a matmul's products in Triton: the greatest entries of every row, kept while the products are made.

    a program: a block of rows, and all tiles of columns one after the other
        one entry:   every lane keeps the best of its columns and its place; the lanes are joined at the end
        several:     a list per row of int64 keys, number above place (triton_helpers.search_keys): a tile replaces the
                     least keys while it has greater ones, and the list is put in order at the end
    then the stores

Scores are never written to memory. Columns beyond n never win, not even where all real scores are -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchweld.codegen.ir import MatmulPart, Part, Schedule
from torchweld.codegen.triton_folds import FoldPrinter, Lanes, state_dtype
from torchweld.codegen.triton_frame import Dim, Group
from torchweld.codegen.triton_matmul import enter_rows, print_products, row_tiles
from torchweld.codegen.triton_schedule import is_whole_blocks, power_of_two, width
from torchweld.codegen.triton_store import is_wide, print_store, tile_group
from torchweld.codegen.triton_text import Value
from torchweld.graph.terms import Fold, Monoid

_KEYED = (torch.float32, torch.float16, torch.bfloat16)


def search_refusal(part: Part) -> str | None:
    """Why a part is not printed: several entries of scores that do not fit in half a key. None for all others."""
    if not isinstance(part, MatmulPart) or width(part.ranks) == 1:
        return None
    dtype = _fold(part).body.dtype
    if dtype in _KEYED:
        return None
    return (
        f"{part.choices[0].name}: a search for several {str(dtype).removeprefix('torch.')} scores of a row has no "
        "Triton, whose lists hold floats of at most 32 bits; leave fuse_vertical out, and the products are stored"
    )


def print_search(printer: FoldPrinter, part: MatmulPart, schedule: Schedule) -> None:
    """The body of a function that runs program `pid` of a MatmulPart with choices.

    NotImplementedError for what search_refusal refuses.
    """
    if (reason := search_refusal(part)) is not None:
        raise NotImplementedError(reason)
    m_tiles = row_tiles(printer, part, schedule)
    enter_rows(printer, part, schedule, f"(pid // {m_tiles.operand})", m_tiles)
    count = int(width(part.ranks))
    if count == 1:
        _print_greatest(printer, part, schedule)
    else:
        _print_several(printer, part, schedule, count)


def _fold(part: MatmulPart, number: int = 0) -> Fold:
    fold = part.choices[number].term
    if not isinstance(fold, Fold):
        raise TypeError(f"choice {part.choices[number].name!r}: expected a Fold, got {type(fold).__name__}")
    return fold


def _print_tiles(
    printer: FoldPrinter, part: MatmulPart, schedule: Schedule, take: Callable[[Value], list[str]]
) -> None:
    """The loop over the tiles of columns; `take`, given a tile's columns, prints what becomes of its products.

    The lines that `take` returns are written in front of the loop.
    """
    start, block = printer.writer.names.fresh("start"), schedule.block_n
    extent = printer.index(part.n.extent)
    with printer.captured() as lines:
        text = f"({start} + tl.arange(0, {block}))"
        wide = ".to(tl.int64)" if is_wide(printer, (part.n,)) else ""
        n = printer.writer.let(part.n.name, Value(f"{text}{wide}[None, :]", frozenset({part.n.name})))
        mask = None if is_whole_blocks((part.n,), block) else f"{n.text} < {extent.operand}"
        tile = Group((part.n,), n), {part.n.name: Dim(1, block, mask)}
        print_products(printer, part, tile, schedule)
        with printer.within(printer.frame.with_group(tile[0], **tile[1])):
            first = take(n)
    printer.writer.lines += first
    printer.writer.block(f"for {start} in range(0, {extent.text}, {block}):", lines)


def _print_greatest(printer: FoldPrinter, part: MatmulPart, schedule: Schedule) -> None:
    """One entry per row: the best of every lane, then of all lanes."""
    body, dim = _fold(part).body, part.n.name
    search = Fold(torch.int64, Monoid("argmax"), (part.n,), body)
    printer.adopt(search)
    state: list[Value] = []

    def take(n: Value) -> list[str]:
        value = printer.body_value(search, n, dim)
        shape = printer.frame.shape(value.dims)
        names = printer.combine_into(search, value, n)
        state.extend(Value(name, value.dims) for name in names)
        lanes = f"tl.broadcast_to(tl.arange(0, {schedule.block_n})[None, :], {shape})"
        with printer.writer.captured() as first:
            printer.start_loop(search, names, shape, lanes)
        return first

    _print_tiles(printer, part, schedule, take)
    lanes = Lanes(state[0], dim, state[1])
    for number, bind in enumerate(part.choices):
        fold = _fold(part, number)
        if fold.monoid.kind == "argmax":
            found = printer.find(fold, lanes)
        else:
            dtype = state_dtype(search)
            found = printer.cast(printer.reduce("max", dtype, state[0], dim), dtype, fold.dtype)
        printer.refs[bind.name] = printer.writer.let(bind.name, found)
    frame = printer.frame.with_group(Group(part.ranks, Value("0"))) if part.ranks else printer.frame
    with printer.within(frame):
        for store in part.stores:
            print_store(printer, store)


def _print_several(printer: FoldPrinter, part: MatmulPart, schedule: Schedule, count: int) -> None:
    """`count` entries per row, which are the columns of what is stored."""
    body, dim, writer = _fold(part).body, part.n.name, printer.writer
    writer.helpers |= dict.fromkeys(
        ("search_keys", "no_keys", "keep_greatest", "keys_in_order", "key_value", "key_place")
    )
    rows, lanes, list_name = schedule.block_rows, power_of_two(count), writer.names.fresh("greatest")
    row_dims: list[frozenset[str]] = []

    def take(n: Value) -> list[str]:
        score = printer.term(body)
        row_dims.append(score.dims - {dim})
        keys = writer.let("keys", Value(f"search_keys({score.text}, {n.text})", score.dims))
        if (mask := printer.frame.dims[dim].mask) is not None:
            keys = writer.let(
                "keys", Value(f"tl.where({mask}, {keys.text}, -0x7FFFFFFFFFFFFFFF)", score.dims)
            )
        writer.line(f"{list_name} = keep_greatest({list_name}, {keys.text})")
        return [f"{list_name} = no_keys({rows}, {lanes}, {count})"]

    _print_tiles(printer, part, schedule, take)
    writer.line(f"{list_name} = keys_in_order({list_name}, {lanes}, {count})")
    (axis,) = part.ranks
    group, dims = tile_group(printer, part.ranks, lanes, "0", 1, axis.name)
    for number, bind in enumerate(part.choices):
        fold = _fold(part, number)
        if fold.monoid.kind == "argmax":
            found = Value(f"key_place({list_name})", row_dims[0] | dims.keys())
            found = printer.cast(found, torch.int64, fold.dtype)
        else:
            found = Value(f"key_value({list_name})", row_dims[0] | dims.keys())
        printer.refs[bind.name] = writer.let(bind.name, found)
    with printer.within(printer.frame.with_group(group, **dims)):
        for store in part.stores:
            print_store(printer, store)
