"""The layout that keeps every position: a slot per position.

A large cache gets the addresses of at least twice the slots that it needs; the system gives memory to those that are
written. So it grows without being copied, and holds what it needs but for a part of a page per head. A small one is
copied whenever one part in twenty more is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.decoding.cache_lazy import LazyStore
from torchweld.decoding.cache_slots import LEAST_SLOTS, SPARE_PARTS

LEAST_ADDRESSES = 1024
"""Slots of a large cache at least: every growth makes the compiled step look at new sizes, which takes milliseconds."""


class FullStore(LazyStore):
    """Every position of every sequence; memory grows with each of them, not past the limit without need."""

    @property
    def is_swollen(self) -> bool:
        """Nothing is larger for a while here."""
        return False

    def slots_for(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        """All positions: the slots of a longer sequence serve the others too."""
        return max(length + count for length, count in zip(lengths, rows, strict=True))

    def slots_with_spare(self, needed: int) -> int:
        """Up to the limit (padding behind it may need more): twice as many, or one part in twenty more."""
        wanted = max(LEAST_SLOTS, needed + needed // SPARE_PARTS)
        if self.is_lazy(max(needed, LEAST_SLOTS)):
            wanted = max(LEAST_ADDRESSES, 1 << needed.bit_length())
        return wanted if self.limit is None else max(needed, min(wanted, self.limit))

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing is larger for a while here."""

    def refuse_truncate(self, sequence: int, length: int) -> str | None:
        """Every position is there."""
        return None
