"""The layout that keeps every position: a slot per position, and a few to spare."""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.decoding.cache_slots import LEAST_SLOTS, SPARE_PARTS, SlotStore


class FullStore(SlotStore):
    """Every position of every sequence; memory grows with the longest, not past the limit without need."""

    def slots_for(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        """All positions: the slots of a longer sequence serve the others too."""
        return max(length + count for length, count in zip(lengths, rows, strict=True))

    def slots_with_spare(self, needed: int) -> int:
        """One part in twenty more, up to the limit; padding behind the limit may need more than that."""
        wanted = max(LEAST_SLOTS, needed + needed // SPARE_PARTS)
        return wanted if self.limit is None else max(needed, min(wanted, self.limit))

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing is larger for a while here."""

    def refuse_truncate(self, sequence: int, length: int) -> str | None:
        """Every position is there."""
        return None
