"""Pages of a mapped file are given back, and only those that nobody wrote to."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchweld.codegen.release_pages import release_file_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
SIZE = 1 << 20


def mapped(path: Path) -> Tensor:
    """A private mapping of a file of random bytes, all of it read once."""
    path.write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    with path.open("rb") as file:
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    data.sum()
    return data


def resident(data: Tensor) -> int:
    """Bytes of the mapping that are in memory."""
    text = Path("/proc/self/smaps").read_text()
    start = text.index(f"{data.data_ptr():x}-")
    return int(text[text.index("\nRss:", start) :].split()[1]) * 1024


def test_clean_pages_are_dropped_and_come_back(tmp_path: Path) -> None:
    data = mapped(tmp_path / "weights")
    before = data.clone()
    assert resident(data) == SIZE
    assert release_file_pages([data]) == SIZE
    assert resident(data) == 0
    assert torch.equal(data, before)


def test_parts_are_dropped_by_whole_pages(tmp_path: Path) -> None:
    data = mapped(tmp_path / "weights")
    assert release_file_pages([data[100 : 100 + 3 * mmap.PAGESIZE]]) == 2 * mmap.PAGESIZE
    assert release_file_pages([data[10:90], data[: 2 * mmap.PAGESIZE : 2]]) == 0


def test_a_mapping_with_a_written_page_is_kept(tmp_path: Path) -> None:
    data = mapped(tmp_path / "weights")
    data[5000] = 255 - data[5000]
    before = data.clone()
    assert release_file_pages([data]) == 0
    assert torch.equal(data, before)


def test_memory_that_is_no_file_is_kept() -> None:
    data = torch.full((SIZE,), 7, dtype=torch.uint8)
    assert release_file_pages([data]) == 0
    assert bool((data == 7).all())
    assert release_file_pages([]) == 0
