"""Tile sizes for Triton, chosen per part.

The limits come from registers: 255 per thread and no spills on any target.  A tile of E elements over W warps costs
E / (32 W) registers for each value that is alive, and a fused row kernel keeps a handful alive, so a row tile holds at
most 2048 elements per 4 warps.  float32 products run without tensor cores ("ieee"), where the accumulator and both
operand fragments stand in registers; 32 x 64 and steps of 16 keep them below half the file.
"""

from __future__ import annotations

from math import prod

import sympy

from torchweld.codegen.ir import AttentionPart, MatmulPart, Part, RowPart, Schedule, part_terms
from torchweld.graph.terms import Attend, Axis, Expr, Fold

MAX_TILE = 4096
"""The widest row that is held as one tile; wider rows are walked in blocks of MAX_TILE / 2."""


def power_of_two(value: int) -> int:
    """The least power of two that is at least `value` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def width(axes: tuple[Axis, ...]) -> Expr:
    """The product of the extents."""
    return prod((axis.extent for axis in axes), start=sympy.Integer(1))


def column_block(axes: tuple[Axis, ...]) -> int:
    """Elements of one column tile over the flattened `axes`: the padded width, or half of MAX_TILE for a loop."""
    extent = width(axes)
    if not extent.is_Integer:
        return MAX_TILE // 4
    padded = power_of_two(int(extent))
    return padded if padded <= MAX_TILE else MAX_TILE // 2


def is_single_tile(axes: tuple[Axis, ...]) -> bool:
    """Whether one column tile covers the flattened `axes`."""
    extent = width(axes)
    return bool(extent.is_Integer) and power_of_two(int(extent)) <= MAX_TILE


def is_whole_blocks(axes: tuple[Axis, ...], block: int) -> bool:
    """Proof that blocks of `block` cover the flattened `axes` without a rest."""
    extent = width(axes)
    return bool(extent.is_Integer) and int(extent) > 0 and int(extent) % block == 0


def gpu_schedule(part: Part, shrink: int = 0) -> Schedule:
    """The schedule to print `part` with: its own where that differs from the default, else one that fits the GPUs.

    shrink: 0 for the usual tiles; 1 to MAX_SHRINK for other ones, smaller or spread over more warps, for kernels that
    spilled.  (The assembler spills a few bytes on purpose where that lets one more block run, so no rule of thumb
    finds the right tile for all targets: they are tried.)  A part that brings its own schedule keeps it at 0.
    """
    if part.schedule != Schedule() and shrink == 0:
        return part.schedule
    match part:
        case RowPart():
            return _row_schedule(part, shrink)
        case MatmulPart():
            return (_SEARCH if part.choices else _MATMUL)[shrink]
        case AttentionPart():
            return _attention_schedule(part, shrink)


MAX_SHRINK = 3

_MATMUL = (
    Schedule(block_rows=32, block_n=64, block_k=16, warps=4, stages=2),
    Schedule(block_rows=16, block_n=64, block_k=16, warps=4, stages=1),
    Schedule(block_rows=16, block_n=32, block_k=16, warps=4, stages=1),
    Schedule(block_rows=16, block_n=16, block_k=16, warps=4, stages=1),
)

# A program goes over all columns, so what it reads at a time decides how fast the weight comes in.
_SEARCH = (
    Schedule(block_rows=16, block_n=256, block_k=64, warps=8, stages=1),
    Schedule(block_rows=16, block_n=128, block_k=64, warps=8, stages=1),
    Schedule(block_rows=16, block_n=128, block_k=32, warps=8, stages=1),
    Schedule(block_rows=16, block_n=64, block_k=16, warps=4, stages=1),
)


def _row_schedule(part: RowPart, shrink: int) -> Schedule:
    folds = [t.axes for t in part_terms(part) if isinstance(t, Fold)]
    blocks = [column_block(axes) for axes in (*folds, part.inner) if axes]
    if not blocks:
        return Schedule(block_rows=512 >> shrink, warps=4, stages=1)
    columns = max(blocks)
    rows = max(1, min(16, 1024 // columns) >> shrink)
    if width(part.grid) == 1:
        rows = 1  # a tile of rows would store one number from each of them
    warps = min(16, (4 if columns * rows <= 2048 else 8) << (shrink if columns > 512 else 0))
    return Schedule(block_rows=rows, block_n=columns, warps=warps, stages=1)


def _attention_schedule(part: AttentionPart, shrink: int) -> Schedule:
    attend = next(t for t in part_terms(part) if t is part.attend.term)
    if not isinstance(attend, Attend):
        raise TypeError(f"an AttentionPart binds an Attend, got {type(attend).__name__}")
    features = max(power_of_two(int(part.feature.extent)), power_of_two(int(attend.d.extent)), 16)
    if _may_be_few(part, attend):
        return (_NARROW_SPLIT if features <= 64 else _WIDE_SPLIT)[shrink]
    return (_NARROW_HEADS if features <= 64 else _WIDE_HEADS)[shrink]


def _may_be_few(part: AttentionPart, attend: Attend) -> bool:
    """Whether there may be many keys and few queries: not where a whole text looks at itself."""
    keys = attend.s.extent
    return keys != part.t.extent and not (keys.is_Integer and int(keys) <= SPLIT_KEYS)


SPLIT_KEYS = 256
"""Keys per split: 8 key heads at 4096 keys are 128 programs, about one per multiprocessor."""

_NARROW_HEADS = (
    Schedule(block_rows=32, block_k=16, warps=4, stages=1),
    Schedule(block_rows=16, block_k=16, warps=4, stages=1),
    Schedule(block_rows=16, block_k=32, warps=8, stages=1),
    Schedule(block_rows=16, block_k=16, warps=8, stages=1),
)
_WIDE_HEADS = (
    Schedule(block_rows=16, block_k=16, warps=8, stages=1),
    Schedule(block_rows=16, block_k=32, warps=8, stages=1),
    Schedule(block_rows=16, block_k=16, warps=4, stages=1),
    Schedule(block_rows=16, block_k=16, warps=16, stages=1),
)
_NARROW_SPLIT = (
    Schedule(block_rows=16, block_k=16, warps=4, stages=1, split_keys=SPLIT_KEYS),
    Schedule(block_rows=16, block_k=16, warps=8, stages=1, split_keys=SPLIT_KEYS),
    Schedule(block_rows=16, block_k=32, warps=4, stages=1, split_keys=SPLIT_KEYS),
    Schedule(block_rows=16, block_k=32, warps=8, stages=1, split_keys=SPLIT_KEYS),
)
_WIDE_SPLIT = (
    Schedule(block_rows=16, block_k=32, warps=8, stages=1, split_keys=SPLIT_KEYS),
    Schedule(block_rows=16, block_k=16, warps=8, stages=1, split_keys=SPLIT_KEYS),
    Schedule(block_rows=16, block_k=16, warps=4, stages=1, split_keys=SPLIT_KEYS),
    Schedule(block_rows=16, block_k=16, warps=16, stages=1, split_keys=SPLIT_KEYS),
)


def padded_features(axis: Axis) -> int:
    """The tile extent of an attention's feature axis; 16 is the least that tensor cores take."""
    if not axis.extent.is_Integer:
        raise ValueError(
            f"attention over axis {axis.name}: the number of features must be known, got {axis.extent}"
        )
    return max(power_of_two(int(axis.extent)), 16)
