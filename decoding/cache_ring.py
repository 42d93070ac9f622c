"""The layout of window layers: a ring of `window + spare` slots; the next row sees the last `window` positions only.

T rows at once need window + T - 1 slots: the first of them still sees window - 1 older positions, which the others must
not overwrite. The spare slots serve steps of up to spare + 1 rows and rolling them back. A step of more rows works
through a larger ring, which comes back once no row of that step can be rolled back any more (decoding/cached.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchweld.decoding.cache_lazy import LazyStore
from torchweld.decoding.cache_slots import LEAST_SLOTS, SPARE_PARTS
from torchweld.passes.step_program import LayerState


class RingStore(LazyStore):
    """The last `window + spare` positions of every sequence; fewer slots while the sequences are shorter."""

    def __init__(
        self,
        states: Sequence[LayerState],
        batch: int,
        device: torch.device,
        limit: int | None,
        *,
        window: int,
        spare: int,
    ) -> None:
        super().__init__(states, batch, device, limit)
        self.window = window
        self.most = window + spare

    def slots_for(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        """A slot per position until the ring has its size; more only where the first of the new rows would lose
        positions that it sees to the last."""
        pairs = zip(lengths, rows, strict=True)
        return max(min(length + count, max(self.most, self.window + count - 1)) for length, count in pairs)

    def slots_with_spare(self, needed: int) -> int:
        """As for all positions, up to the size of the ring; above it exactly what this step needs. A large ring has its
        size from the start, and its memory as it fills."""
        most = self.most if self.limit is None else min(self.most, self.limit)
        if self.is_lazy(most):
            return max(needed, most)
        return max(needed, min(most, max(LEAST_SLOTS, needed + needed // SPARE_PARTS)))

    @property
    def is_swollen(self) -> bool:
        """Whether the ring grew for one step."""
        return self.capacity > self.most

    def settle(self, lengths: Sequence[int]) -> None:
        """A ring that grew for one step forgets the oldest positions again."""
        if self.is_swollen:
            self.resize(self.most, lengths)

    def refuse_truncate(self, sequence: int, length: int) -> str | None:
        """The next row will see `window - 1` positions in front of it: they must still be there."""
        first = max(0, length - self.window + 1)
        if length == 0 or self.oldest[sequence] <= first:
            return None
        return (
            f"a window of {self.window} reads positions from {first} on, and its ring of {self.capacity} slots has "
            f"kept those from {self.oldest[sequence]} on: go back less far, or prefill again"
        )
