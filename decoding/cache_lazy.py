"""What the layouts whose large buffers get their memory as they fill share: `cache_full` and `cache_ring`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.decoding.cache_slots import SlotStore
from torchweld.decoding.lazy_memory import PAGE, lazy_empty, outgrown, pages_touched
from torchweld.passes.step_program import LayerState

LAZY_PAGES = 4
"""Pages of one head from which on memory is handed out lazily; below, parts of pages would be much of the whole."""


class LazyStore(SlotStore):
    """Buffers on the CPU of `LAZY_PAGES` pages per head hold the pages that were written to, not more."""

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
        """Bytes of memory taken: whole buffers, or the pages of large ones that this text wrote to."""
        if not self.is_lazy(self.capacity):
            return super().nbytes
        return PAGE * sum(self._pages(buffer) for buffer in self.buffers)

    def is_lazy(self, slots: int) -> bool:
        """Whether buffers of so many slots get their memory as they fill."""
        return self._is_cpu and slots * self._slot_bytes >= LAZY_PAGES * PAGE

    def wrote(self, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """Rows came behind `lengths`; their pages are taken."""
        super().wrote(lengths, rows)
        capacity = self.capacity
        for sequence, (length, count) in enumerate(zip(lengths, rows, strict=True)):
            if length + count > self._used[sequence]:
                self._used[sequence] = min(length + count, capacity)

    def resize(self, capacity: int, lengths: Sequence[int]) -> None:
        """Another number of slots, for the positions that are there."""
        with outgrown():
            super().resize(capacity, lengths)
        self._used = [min(length, capacity) for length in lengths]

    def take_all(self) -> None:
        """Take the memory of every slot now."""
        super().take_all()
        self._used = [self.capacity] * self.batch

    def _empty(self, buffer: Tensor, capacity: int) -> Tensor:
        if not self.is_lazy(capacity):
            return super()._empty(buffer, capacity)
        return lazy_empty((self.batch, buffer.shape[1], capacity, buffer.shape[3]), buffer.dtype)

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
