"""The cache of a derived step: rows of keys and values per layer, in buffers that grow as they fill.

    cache = Cache(states, batch=1, max_length=4096)
    cache.append(new_rows)           # [T, B, heads, features] per tensor
    cache.views()                    # [length, B, heads, features] per tensor, contiguous, no copy
    removed = cache.truncate(10)     # roll back to 10 positions

Every layer keeps every position, also a window layer (it may forget, but then could not roll back). All changes
are checked before the first one is made: an error leaves the cache as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.passes.rewrite_kv_cache import LayerState

# Growing copies what is there. One part in 24 keeps the memory within 1.05 times what is needed, and a copy every
# twentieth token costs little beside the step, which reads the whole cache every time.
LEAST_GROWTH = 16
GROWTH_PARTS = 24


class CacheError(ValueError):
    """The cache cannot do what was asked: names the limit or shape, and what was expected. Nothing changed."""


class Cache:
    """Keys and values of `length` positions for `batch` rows of equal length.

    max_length: positions beyond which `append` refuses; None for no limit. Memory grows in small parts, up to the
    limit. Not safe for use by several threads at once.
    """

    def __init__(self, states: Sequence[LayerState], batch: int, max_length: int | None = None) -> None:
        if batch < 1:
            raise CacheError(f"a cache for {batch} rows; expected at least 1")
        if max_length is not None and max_length < 1:
            raise CacheError(f"a cache of at most {max_length} positions; expected at least 1")
        self.states = tuple(states)
        self.batch = batch
        self.max_length = max_length
        self._length = 0
        self._buffers = [
            torch.empty(0, batch, state.heads, features, dtype=state.dtype)
            for state in self.states
            for features in (state.key_features, state.value_features)
        ]

    @property
    def length(self) -> int:
        """Positions that the cache holds."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions that fit without new memory."""
        return min((buffer.shape[0] for buffer in self._buffers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, filled or not."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def views(self) -> tuple[Tensor, ...]:
        """Key and value of every layer, [length, B, heads, features], contiguous; valid until the next append."""
        return tuple(buffer[: self._length] for buffer in self._buffers)

    def check_room(self, positions: int) -> None:
        """CacheError where `positions` more do not fit below the limit."""
        if self.max_length is not None and self._length + positions > self.max_length:
            raise CacheError(
                f"{self._length} positions and {positions} new ones are more than the limit of {self.max_length}: "
                "truncate the cache, or make it with a larger max_length if the model's position table allows it"
            )

    def append(self, rows: Sequence[Tensor]) -> None:
        """Add rows [T, B, heads, features] behind the others, one tensor per buffer.

        Raises CacheError for a wrong count, shape or dtype, and beyond the limit.
        """
        if len(rows) != len(self._buffers):
            raise CacheError(
                f"{len(rows)} tensors for {len(self._buffers)} buffers (a key and a value per layer)"
            )
        count = rows[0].shape[0] if rows else 0
        for number, (given, buffer) in enumerate(zip(rows, self._buffers, strict=True)):
            if given.shape != (count, *buffer.shape[1:]) or given.dtype != buffer.dtype:
                name = f"{'value' if number % 2 else 'key'} of layer {number // 2}"
                expected = f"{buffer.dtype} {(count, *buffer.shape[1:])}"
                raise CacheError(f"{name} is {given.dtype} {tuple(given.shape)}; expected {expected}")
        self.check_room(count)
        self._reserve(self._length + count)
        for given, buffer in zip(rows, self._buffers, strict=True):
            buffer[self._length : self._length + count] = given
        self._length += count

    def truncate(self, length: int) -> int:
        """Forget all positions from `length` on; returns how many. CacheError where `length` is not below or at
        what there is."""
        if not 0 <= length <= self._length:
            raise CacheError(
                f"cannot truncate {self._length} positions to {length}: expected 0 to {self._length}"
            )
        removed = self._length - length
        self._length = length
        return removed

    def fork(self) -> Cache:
        """An independent copy (of what is filled)."""
        copy = Cache(self.states, self.batch, self.max_length)
        copy._buffers = [view.clone() for view in self.views()]
        copy._length = self._length
        return copy

    def _reserve(self, length: int) -> None:
        """Room for `length` positions. Buffer by buffer, so that only one is there twice; where memory runs out on the
        way, the cache holds what it held."""
        if length <= self.capacity:
            return
        wanted = max(length, self.capacity + max(LEAST_GROWTH, self.capacity // GROWTH_PARTS))
        if self.max_length is not None:
            wanted = min(wanted, self.max_length)
        for number, old in enumerate(self.views()):
            new = old.new_empty(wanted, *old.shape[1:])
            new[: self._length] = old
            self._buffers[number] = new
