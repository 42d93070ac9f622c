"""The cache of a derived step: keys and values of every layer, for sequences of different lengths.

    cache = Cache(states, batch=2, max_length=4096)
    cache.check_room([5, 3])            # against the limit
    cache.reserve([5, 5])               # room for so many rows, padding among them
    cache.tensors()                     # key and value of every layer [B, heads, C, features], written in place
    cache.advance([5, 3])               # the step wrote them
    removed = cache.truncate(4)         # roll back; (1, 0) positions went

Layers that see everything keep everything (`cache_full`), window layers keep a ring (`cache_ring`). All changes are
checked before the first one is made: an error leaves the cache as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchweld.decoding.cache_full import FullStore
from torchweld.decoding.cache_ring import RingStore
from torchweld.decoding.cache_slots import CacheError
from torchweld.passes.step_program import LayerState

__all__ = ["Cache", "CacheError"]

SPARE_ROWS = 16
"""Rows beyond its window that a ring keeps: what a step may hold at once, and may be rolled back."""


class Cache:
    """Keys and values of `batch` sequences.

    max_length: positions per sequence beyond which `check_room` refuses; None for no limit.  Memory grows with
    the text, or is there from the start with `up_front` (which needs a limit).  spare: rows that a ring keeps beyond
    its window.  Not safe for use by several threads at once.
    """

    def __init__(
        self,
        states: Sequence[LayerState],
        batch: int,
        max_length: int | None = None,
        *,
        spare: int = SPARE_ROWS,
        up_front: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if batch < 1:
            raise CacheError(f"a cache for {batch} sequences; expected at least 1")
        if max_length is not None and max_length < 1:
            raise CacheError(f"a cache of at most {max_length} positions; expected at least 1")
        if up_front and max_length is None:
            raise CacheError("a cache of unlimited length cannot be there from the start: give a max_length")
        if spare < 0:
            raise CacheError(f"a ring of {spare} rows beyond its window; expected at least 0")
        self.states = tuple(states)
        self.batch = batch
        self.max_length = max_length
        self.spare = spare
        self.tree: tuple[int, ...] | None = None
        """Parents of the newest rows, where they are a tree of which `keep` or `truncate` must choose."""
        self.calls: dict[tuple[object, ...], object] = {}
        """Whatever was prepared for the tensors where they are: it holds them, so it is dropped before they move."""
        self._tensors: list[Tensor] = []
        self._lengths = (0,) * batch
        self._device = device or torch.device("cpu")
        self._stores = self._make_stores()
        numbers = {window: iter(range(len(store.buffers))) for window, store in self._stores.items()}
        self._places = [
            (state.window, next(numbers[state.window])) for state in states for _ in state.features
        ]
        if up_front and max_length is not None:
            for store in self._stores.values():
                store.reserve(self._lengths, (max_length,) * batch)
                store.settle(self._lengths)
                store.take_all()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each sequence."""
        return self._lengths

    @property
    def length(self) -> int:
        """Positions of the longest sequence."""
        return max(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken, filled or not."""
        return sum(store.nbytes for store in self._stores.values())

    def tensors(self, first: int = 0, last: int | None = None) -> list[Tensor]:
        """Key and value, or the one state, of every layer for sequences `first` to `last`: [B, heads, C, features],
        contiguous, no copy; valid until the next `reserve`."""
        if not self._tensors:
            self._tensors = [self._stores[window].buffers[number] for window, number in self._places]
        whole = first == 0 and last in (None, self.batch)
        return list(self._tensors) if whole else [tensor[first:last] for tensor in self._tensors]

    def check_room(self, counts: Sequence[int]) -> None:
        """CacheError where so many more positions per sequence do not fit below the limit, or a tree waits."""
        if len(counts) != self.batch:
            raise CacheError(f"{len(counts)} sequences for a cache of {self.batch}: prefill starts another")
        if self.tree is not None and not is_chain(self.tree):
            raise CacheError(
                "the newest rows are a tree: keep a path of it, or truncate, before the next step"
            )
        for sequence, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if self.max_length is not None and length + count > self.max_length:
                raise CacheError(
                    f"sequence {sequence}: {length} positions and {count} new ones are more than the limit of "
                    f"{self.max_length}: truncate the cache, or make it with a larger max_length if the model's "
                    "position table allows it"
                )

    def reserve(self, rows: Sequence[int]) -> None:
        """Make room for so many more rows per sequence (positions and padding; `check_room` comes before)."""
        for store in self._stores.values():
            if store.slots_for(self._lengths, rows) > store.capacity:
                self._let_go()
                store.reserve(self._lengths, rows)

    def will_write(self, rows: Sequence[int]) -> None:
        """So many rows per sequence are about to be written: what they overwrite counts as gone, also if the step
        fails on the way."""
        for store in self._stores.values():
            store.wrote(self._lengths, rows)

    def advance(self, counts: Sequence[int], tree: Sequence[int] | None = None) -> None:
        """So many of the rows that were written are positions now; `tree`: parents of the rows of the one sequence."""
        self._lengths = tuple([length + count for length, count in zip(self._lengths, counts, strict=True)])
        self.tree = None if tree is None else tuple(tree)

    def settle(self) -> None:
        """Give back what the last step needed for itself alone; a tree needs it until `keep` or `truncate`."""
        if self.tree is not None:
            return
        for store in self._stores.values():
            if store.is_swollen:
                self._let_go()
                store.settle(self._lengths)

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        """Forget all positions from `length` on (one number, or one per sequence); returns how many went.

        Raises CacheError for a length that is not 0 to what there is, where a ring has overwritten what would be read
        again, and inside a tree that is no chain.
        """
        wanted = (length,) * self.batch if isinstance(length, int) else tuple(length)
        if len(wanted) != self.batch:
            raise CacheError(f"{len(wanted)} lengths for a cache of {self.batch} sequences")
        for sequence, (new, old) in enumerate(zip(wanted, self._lengths, strict=True)):
            self._check_truncate(sequence, new, old)
        removed = tuple(old - new for new, old in zip(wanted, self._lengths, strict=True))
        if self.tree is None or sum(removed) >= len(self.tree):
            self.tree = None
        else:
            self.tree = self.tree[: len(self.tree) - sum(removed)]
        if self.tree is not None and is_chain(self.tree):
            self.tree = None
        self._lengths = wanted
        for store in self._stores.values():
            store.forget(wanted)
        self.settle()
        return removed

    def keep(self, rows: Sequence[int]) -> None:
        """Of the tree that was written last keep only these rows, a path from the root, as the next positions.

        Raises CacheError where there is no tree, and for rows that are no such path.
        """
        if self.tree is None:
            raise CacheError("keep follows a step with parents: there is no tree of rows to choose from")
        parents = [-1, *rows[:-1]] if rows else []
        good = all(
            0 <= row < len(self.tree) and self.tree[row] == up for row, up in zip(rows, parents, strict=True)
        )
        if not good:
            raise CacheError(
                f"rows {list(rows)} are no path from the root of the tree with parents {list(self.tree)}"
            )
        start = self._lengths[0] - len(self.tree)
        for store in self._stores.values():
            store.move(start, rows)
        self._lengths = (start + len(rows),)
        self.tree = None
        self.settle()

    def fork(self) -> Cache:
        """An independent copy."""
        copy = Cache(self.states, self.batch, self.max_length, spare=self.spare, device=self._device)
        for store, other in zip(self._stores.values(), copy._stores.values(), strict=True):
            store.copy_into(other, self._lengths)
        copy._lengths, copy.tree = self._lengths, self.tree
        return copy

    def _let_go(self) -> None:
        """Tensors are about to move: do not hold what they leave."""
        self.calls.clear()
        self._tensors = []

    def _check_truncate(self, sequence: int, new: int, old: int) -> None:
        if not 0 <= new <= old:
            raise CacheError(
                f"sequence {sequence}: cannot truncate {old} positions to {new}: expected 0 to {old}"
            )
        if new == old:
            return
        if self.tree is not None:
            left = len(self.tree) - (old - new)
            if left > 0 and not is_chain(self.tree[:left]):
                raise CacheError(
                    f"cannot truncate to {new}: the newest rows are a tree, of which keep chooses a path"
                )
        for store in self._stores.values():
            reason = store.refuse_truncate(sequence, new)
            if reason is not None:
                raise CacheError(f"sequence {sequence}: cannot truncate {old} positions to {new}: {reason}")

    def _make_stores(self) -> dict[int, FullStore | RingStore]:
        """One store per window; 0 keeps everything."""
        stores: dict[int, FullStore | RingStore] = {}
        for window in dict.fromkeys(state.window for state in self.states):
            states = [state for state in self.states if state.window == window]
            stores[window] = (
                RingStore(states, self.batch, self._device, self.max_length, window=window, spare=self.spare)
                if window
                else FullStore(states, self.batch, self._device, self.max_length)
            )
        return stores


def is_chain(parents: Iterable[int]) -> bool:
    """Does every row hang on the one before it?"""
    return all(parent == row - 1 for row, parent in enumerate(parents))
