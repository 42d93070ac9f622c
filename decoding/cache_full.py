"""The layout that keeps every position: a slot per position.

A large cache gets the addresses of twice the slots that it needs; the system gives memory to those that are written.
So it grows without being copied, and holds what it needs but for a part of a page per head. A small one is copied
whenever one part in twenty more is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.decoding.cache_slots import LEAST_SLOTS, SPARE_PARTS, SlotStore
from torchweld.decoding.lazy_memory import PAGE, lazy_empty, pages_touched
from torchweld.passes.rewrite_kv_cache import LayerState

LAZY_PAGES = 4
"""Pages of one head from which on memory is handed out lazily; below, parts of pages would be much of the whole."""


class FullStore(SlotStore):
    """Every position of every sequence; memory grows with each of them, not past the limit without need."""

    def __init__(
        self, states: Sequence[LayerState], batch: int, device: torch.device, limit: int | None = None
    ) -> None:
        super().__init__(states, batch, device, limit)
        self._is_cpu = device.type == "cpu"
        self._slot_bytes = min(buffer.shape[3] * buffer.itemsize for buffer in self.buffers)
        self._used = [0] * batch
        """Slots that were ever written since memory was taken, per sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken: whole buffers, or the pages of large ones that were written to."""
        if not self._is_lazy(self.capacity):
            return super().nbytes
        return PAGE * sum(self._pages(buffer) for buffer in self.buffers)

    def slots_for(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        """All positions: the slots of a longer sequence serve the others too."""
        return max(length + count for length, count in zip(lengths, rows, strict=True))

    def slots_with_spare(self, needed: int) -> int:
        """Up to the limit (padding behind it may need more): twice as many, or one part in twenty more."""
        wanted = max(LEAST_SLOTS, needed + needed // SPARE_PARTS)
        if self._is_lazy(needed):
            wanted = 1 << needed.bit_length()
        return wanted if self.limit is None else max(needed, min(wanted, self.limit))

    def settle(self, lengths: Sequence[int]) -> None:
        """Nothing is larger for a while here."""

    def refuse_truncate(self, sequence: int, length: int) -> str | None:
        """Every position is there."""
        return None

    def wrote(self, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """Rows came behind `lengths`; their pages are taken."""
        super().wrote(lengths, rows)
        written = (length + count for length, count in zip(lengths, rows, strict=True))
        self._used = [max(pair) for pair in zip(self._used, written, strict=True)]

    def resize(self, capacity: int, lengths: Sequence[int]) -> None:
        """Another number of slots, for the positions that are there."""
        super().resize(capacity, lengths)
        self._used = list(lengths)

    def take_all(self) -> None:
        """Take the memory of every slot now."""
        super().take_all()
        self._used = [self.capacity] * self.batch

    def _empty(self, buffer: Tensor, capacity: int) -> Tensor:
        if not self._is_lazy(capacity):
            return super()._empty(buffer, capacity)
        return lazy_empty((self.batch, buffer.shape[1], capacity, buffer.shape[3]), buffer.dtype)

    def _is_lazy(self, slots: int) -> bool:
        return self._is_cpu and slots * self._slot_bytes >= LAZY_PAGES * PAGE

    def _pages(self, buffer: Tensor) -> int:
        """Pages of a buffer that hold a slot that was written."""
        row = buffer.shape[2] * buffer.shape[3] * buffer.itemsize
        slot = buffer.shape[3] * buffer.itemsize
        starts = [
            (s, (s * buffer.shape[1] + head) * row)
            for s in range(self.batch)
            for head in range(buffer.shape[1])
        ]
        return pages_touched([(start, start + self._used[s] * slot) for s, start in starts])
