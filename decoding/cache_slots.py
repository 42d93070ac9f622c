"""What the layouts of a cache share: keys and values in slots, position j of a sequence in slot j mod C.

    store = FullStore(states, batch=2)
    store.reserve((7, 3), (4, 4))       # room for 4 more rows behind 7 and 3 positions
    store.wrote((7, 3), (4, 4))         # they are in; what they overwrote is gone
    store.settle((11, 7))               # what was larger for a while becomes small again

A layout decides the number of slots (`cache_full`, `cache_ring`). Another kind of storage (pages, int8) is another
class with these methods, and another pair of own ops in the step graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.passes.step_program import LayerState

# One slot in twenty may be empty: within 1.05 times what is needed.
SPARE_PARTS = 20
LEAST_SLOTS = 64


class CacheError(ValueError):
    """The cache cannot do what was asked: names the limit or shape, and what was expected. Nothing changed."""


class SlotStore(ABC):
    """The states of the layers of one kind: buffers [B, heads, C, features], mostly a key and a value per layer.

    limit: positions that there will be at most; None for any number.
    """

    def __init__(
        self, states: Sequence[LayerState], batch: int, device: torch.device, limit: int | None = None
    ) -> None:
        self.states = tuple(states)
        self.batch = batch
        self.limit = limit
        self.oldest = [0] * batch
        """The first position of each sequence that is still there."""
        self.buffers = [
            torch.empty(batch, state.heads, 0, features, dtype=state.dtype, device=device)
            for state in self.states
            for features in state.features
        ]

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.buffers[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken, filled or not."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @abstractmethod
    def slots_for(self, lengths: Sequence[int], rows: Sequence[int]) -> int:
        """The least number of slots with which so many more rows per sequence keep all that they and the next see."""

    @abstractmethod
    def slots_with_spare(self, needed: int) -> int:
        """How many slots to make when `needed` are."""

    @abstractmethod
    def settle(self, lengths: Sequence[int]) -> None:
        """After a step: give back what it needed for itself alone."""

    @abstractmethod
    def refuse_truncate(self, sequence: int, length: int) -> str | None:
        """Why this sequence cannot go back to `length` positions; None if it can."""

    def reserve(self, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """Make room for so many more rows per sequence. Where memory runs out, everything is as it was."""
        needed = self.slots_for(lengths, rows)
        if needed > self.capacity:
            self.resize(self.slots_with_spare(needed), lengths)

    def wrote(self, lengths: Sequence[int], rows: Sequence[int]) -> None:
        """So many rows came behind `lengths`: they lie where older positions were."""
        for sequence, (length, count) in enumerate(zip(lengths, rows, strict=True)):
            if count:
                self.oldest[sequence] = max(self.oldest[sequence], length + count - self.capacity)

    def forget(self, lengths: Sequence[int]) -> None:
        """Sequences went back to `lengths` (that `refuse_truncate` allowed): an empty one begins anew."""
        self.oldest = [oldest if length else 0 for oldest, length in zip(self.oldest, lengths, strict=True)]

    def resize(self, capacity: int, lengths: Sequence[int]) -> None:
        """Another number of slots: the last positions that are there and fit move to their new slots."""
        old_capacity = self.capacity
        first = [max(oldest, length - capacity) for oldest, length in zip(self.oldest, lengths, strict=True)]
        # All of the new memory before the first change; it is only touched buffer by buffer.
        fresh = [self._empty(buffer, capacity) for buffer in self.buffers]
        stays = not any(self.oldest) and max(lengths) <= min(capacity, old_capacity)
        spans = [torch.arange(start, length) for start, length in zip(first, lengths, strict=True)]
        slots = [(span % capacity, span % max(old_capacity, 1)) for span in spans]
        for number, new in enumerate(fresh):
            old = self.buffers[number]
            if stays:  # nothing has turned
                for sequence, length in enumerate(lengths):
                    new[sequence, :, :length] = old[sequence, :, :length]
            else:
                for sequence, (target, source) in enumerate(slots):
                    new[sequence][:, target] = old[sequence][:, source]
            self.buffers[number] = new
        self.oldest = first

    def move(self, start: int, rows: Sequence[int]) -> None:
        """Of the new rows behind `start` positions, let these (ascending) be the next positions; one sequence."""
        source = torch.tensor([start + row for row in rows], dtype=torch.int64) % self.capacity
        target = (start + torch.arange(len(rows))) % self.capacity
        for buffer in self.buffers:
            buffer[:, :, target] = buffer[:, :, source]

    def copy_into(self, other: SlotStore, lengths: Sequence[int]) -> None:
        """Make `other`, a fresh store of this layout, an independent copy of what is there of so many positions."""
        other.resize(self.capacity, [0] * self.batch)
        for number, buffer in enumerate(self.buffers):
            for sequence, length in enumerate(lengths):
                slots = min(length, self.capacity)
                other.buffers[number][sequence, :, :slots] = buffer[sequence, :, :slots]
        other.wrote([0] * self.batch, lengths)
        other.oldest = list(self.oldest)

    def take_all(self) -> None:
        """Take the memory of every slot now."""
        for buffer in self.buffers:
            buffer.zero_()

    def _empty(self, buffer: Tensor, capacity: int) -> Tensor:
        """A buffer like this one with another number of slots."""
        return buffer.new_empty(self.batch, buffer.shape[1], capacity, buffer.shape[3])
