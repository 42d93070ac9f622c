"""Where intermediate values live: offsets in one arena, places reused as soon as their value is dead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

ALIGNMENT: Final = 64


@dataclass(frozen=True)
class Lifetime:
    """A value of `nbytes` that exists from step `first` (which writes it) to step `last` (its last reader)."""

    name: str
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Byte offsets by value, the size of the arena, and the sum of all values for comparison."""

    offsets: dict[str, int]
    arena_bytes: int
    total_bytes: int


def plan_memory(values: Sequence[Lifetime]) -> MemoryPlan:
    """Best fit in order of birth: the smallest free place that is large enough, else the end of the arena.

    Values that exist in a common step never overlap; every offset is a multiple of 64.
    """
    births = sorted(values, key=lambda v: (v.first, -v.nbytes, v.name))
    live: list[tuple[int, int, int]] = []  # (offset, size, last)
    offsets: dict[str, int] = {}
    end = 0
    for value in births:
        live = sorted(place for place in live if place[2] >= value.first)
        size = _aligned(value.nbytes)
        offset = _best_fit(live, size)
        offsets[value.name] = offset
        if size:
            live.append((offset, size, value.last))
        end = max(end, offset + size)
    return MemoryPlan(offsets, end, sum(_aligned(value.nbytes) for value in values))


def _best_fit(live: Sequence[tuple[int, int, int]], size: int) -> int:
    """The offset of the tightest gap between the live places (sorted by offset), or of the end behind them."""
    best: tuple[int, int] | None = None
    cursor = 0
    for offset, taken, _ in live:
        gap = offset - cursor
        if gap >= size and gap > 0 and (best is None or gap < best[0]):
            best = (gap, cursor)
        cursor = max(cursor, offset + taken)
    return cursor if best is None else best[1]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
