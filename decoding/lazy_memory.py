"""Memory that costs nothing until it is touched: room for a cache that grows without being copied."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


def lazy_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory on the CPU that the system hands out page by page as it is written to; freed with the tensor.

    Pages of 2 MiB are declined, so that no more is taken than is written. Raises OSError without address space.
    """
    nbytes = prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape)).view(shape)


def pages_touched(spans: list[tuple[int, int]]) -> int:
    """Pages that byte ranges [start, end) of one tensor lie on; the ranges ascend and do not overlap."""
    count, last = 0, -1
    for start, end in spans:
        if end > start:
            first, until = max(start // PAGE, last + 1), (end - 1) // PAGE
            count, last = count + max(0, until + 1 - first), max(last, until)
    return count
