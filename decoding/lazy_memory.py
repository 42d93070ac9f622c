"""Memory that costs nothing until it is touched: room for a cache that grows without being copied.

Touching 4 KB for the first time costs the system about 1.5 us, a prompt of 512 tokens of SmolLM2 5,760 times that. So
blocks that a text is done with serve the next text of the same size, up to `MOST_KEPT` bytes of them in all.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Final

import torch
from torch import Tensor

PAGE: Final = mmap.PAGESIZE
MOST_KEPT: Final = 64 << 20
"""Bytes (of address space; touched or not) of blocks that wait for their next use."""


class _Blocks:
    """Blocks of memory by size; those that nobody uses wait here."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[mmap.mmap]] = {}
        self._nbytes = 0
        self._keeps = True
        # Reentrant: the garbage collector may give a block back while one is taken.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> mmap.mmap:
        """A block that was used before, or a new one; what waits is given up if it is of no use for this size."""
        with self._lock:
            if blocks := self._waiting.get(nbytes):
                self._nbytes -= nbytes
                return blocks.pop()
            self._waiting, self._nbytes = {}, 0
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return pages

    def give_back(self, pages: mmap.mmap) -> None:
        """Keep the block for the next use of its size, if it is not too much."""
        with self._lock:
            if self._keeps and self._nbytes + len(pages) <= MOST_KEPT:
                self._waiting.setdefault(len(pages), []).append(pages)
                self._nbytes += len(pages)

    @contextmanager
    def kept_none(self) -> Iterator[None]:
        """What is given back meanwhile goes back to the system."""
        with self._lock:
            before, self._keeps = self._keeps, False
            try:
                yield
            finally:
                self._keeps = before

    def after_fork(self) -> None:
        """In a child process: a lock that another thread of the parent held would never be released."""
        self._lock = threading.RLock()


_blocks: Final = _Blocks()
os.register_at_fork(after_in_child=_blocks.after_fork)


def lazy_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory on the CPU that the system hands out page by page as it is written to: zeros, or what an earlier tensor of
    this size held.

    Pages of 2 MiB are declined, so that no more is taken than is written. Raises OSError without address space.
    """
    nbytes = prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    pages = _blocks.take(nbytes)
    room = (ctypes.c_char * nbytes).from_buffer(pages)  # lives as long as the tensor's memory is used
    weakref.finalize(room, _blocks.give_back, pages).atexit = False
    return torch.frombuffer(room, dtype=dtype).view(shape)


def outgrown() -> AbstractContextManager[None]:
    """While a cache moves: what it leaves is of a size that is not needed again."""
    return _blocks.kept_none()


def pages_touched(spans: list[tuple[int, int]]) -> int:
    """Pages that byte ranges [start, end) of one tensor lie on; the ranges ascend and do not overlap."""
    count, last = 0, -1
    for start, end in spans:
        if end > start:
            first, until = max(start // PAGE, last + 1), (end - 1) // PAGE
            count, last = count + max(0, until + 1 - first), max(last, until)
    return count
