"""What all parts share: row variables and stores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchweld.codegen.ir import Store
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_frame import Dim, Group
from torchweld.codegen.triton_schedule import is_whole_blocks, width
from torchweld.codegen.triton_terms import all_of
from torchweld.codegen.triton_text import DTYPE_NAMES, Value, carrier_name
from torchweld.graph.terms import Axis


def is_wide(printer: FoldPrinter, axes: Sequence[Axis]) -> bool:
    """Whether an offset over the flattened `axes` may pass 2^31: their extent is not known, or a buffer is large."""
    if not width(tuple(axes)).is_Integer:
        return True
    shapes = [b.shape for b in printer.kernel.buffers]
    return any(all(e.is_Integer for e in shape) and _elements(shape) >= 2**31 for shape in shapes)


def _elements(shape: Sequence[object]) -> int:
    total = 1
    for extent in shape:
        total *= int(extent)  # type: ignore[call-overload]
    return total


def tile_group(
    printer: FoldPrinter, axes: tuple[Axis, ...], block: int, number: str, place: int, hint: str
) -> tuple[Group, dict[str, Dim]]:
    """The variable that numbers the elements of tile `number` of the flattened `axes`, and its dimension.

    A block of 1 is a scalar without a dimension. In a frame of rank 2 the variable spans rows (place 0) or columns.
    """
    number = f"{number}.to(tl.int64)" if is_wide(printer, axes) and number != "0" else number
    if block == 1:
        scalar = printer.writer.let(hint, Value(number))
        return Group(axes, scalar), {}
    text = f"tl.arange(0, {block})" if number == "0" else f"{number} * {block} + tl.arange(0, {block})"
    if printer.frame.rank == 2:
        text = f"({text}){'[:, None]' if place == 0 else '[None, :]'}"
    flat = printer.writer.let(hint, Value(text, frozenset({hint})))
    mask = None if is_whole_blocks(axes, block) else f"{flat.text} < {printer.index(width(axes)).operand}"
    return Group(axes, flat), {hint: Dim(place, block, mask)}


def print_store(printer: FoldPrinter, store: Store) -> None:
    """One store at the points of the current frame."""
    buffer = printer.kernel.buffer(store.buffer)
    value = printer.term(store.value)
    offset = printer.offset(store.index, buffer.shape)
    conditions, dims = printer.conditions(offset.dims | value.dims, store.index)
    # The result of a vector product has no row, say: every row points to it, and the mask picks one.
    for name in sorted(dims - offset.dims):
        index = printer.tile_index(frozenset({name}))
        offset = Value(f"{offset.text} + 0 * {index}", offset.dims | {name})
    at = printer.pointers[store.buffer] + ("" if offset.text == "0" else f" + {offset.text}")
    text = _as_stored(value, store.value.dtype, buffer.dtype)
    mask = f", mask={all_of(conditions)}" if conditions else ""
    printer.writer.line(f"tl.store({at}, {text}{mask})")


def _as_stored(value: Value, source: torch.dtype, target: torch.dtype) -> str:
    if value.is_literal:
        return value.text
    if target == torch.bool:
        return value.text if source == torch.bool else f"{value.operand} != 0"
    if carrier_name(source) == DTYPE_NAMES[target]:
        return value.text
    return f"{value.operand}.to({DTYPE_NAMES[target]})"
