"""Give back the memory of a file that was read: pages of a private mapping that nobody wrote to.

A model file is mapped, not copied; once its weights are packed, its pages are in memory for nothing. They are dropped
from this process only: the system may keep them in its file cache, and reading them again brings them back.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

_AREA: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ([rwxps-]{4}) [0-9a-f]+ [0-9a-f:]+ (\d+)", re.MULTILINE)
_CHANGED: Final = re.compile(r"^Anonymous:\s+(\d+) kB", re.MULTILINE)
_SMAPS: Final = Path("/proc/self/smaps")


class FilePages:
    """The private mappings of files in which no page was written to when this was made (none off Linux)."""

    def __init__(self) -> None:
        self._areas: list[tuple[int, int]] = []
        if hasattr(mmap, "MADV_DONTNEED"):
            self._areas = list(_clean_file_areas())
            self._madvise = ctypes.CDLL(None).madvise
            self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def release(self, first: int, last: int) -> int:
        """Drop the pages that lie wholly between two addresses, if those are inside one such mapping; bytes."""
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = last // mmap.PAGESIZE * mmap.PAGESIZE
        if end <= begin or not any(first <= begin and end <= last for first, last in self._areas):
            return 0
        return 0 if self._madvise(begin, end - begin, mmap.MADV_DONTNEED) else end - begin


def release_free_memory() -> None:
    """Give back what was freed in between (of capturing, say) and the C library keeps; nothing but in glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def release_file_pages(tensors: Sequence[Tensor]) -> int:
    """Drop the pages of mapped files that lie wholly inside `tensors`; the bytes dropped at most (0 off Linux).

    Only areas without a single page of their own (written to since they were mapped) are touched, so no value changes.
    """
    if not tensors:
        return 0
    pages = FilePages()
    return sum(
        pages.release(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for tensor in tensors
        if tensor.is_contiguous()
    )


def _clean_file_areas() -> Iterator[tuple[int, int]]:
    """First and last address of every private mapping of a file without a page that was written to."""
    try:
        text = _SMAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    heads = list(_AREA.finditer(text))
    for number, head in enumerate(heads):
        end = heads[number + 1].start() if number + 1 < len(heads) else len(text)
        changed = _CHANGED.search(text, head.end(), end)
        is_file = head.group(4) != "0" and head.group(3).endswith("p")
        if is_file and changed is not None and int(changed.group(1)) == 0:
            yield int(head.group(1), 16), int(head.group(2), 16)
