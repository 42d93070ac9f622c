"""Memory handed out page by page."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.lazy_memory import PAGE, lazy_empty, pages_touched


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * PAGE


def test_only_what_is_written_is_taken() -> None:
    before = resident_bytes()
    tensor = lazy_empty((2, 64, 1 << 20), torch.float32)
    tensor[1, 3, :5] = 7.0
    assert resident_bytes() - before < tensor.nbytes // 100
    assert tensor[1, 3, :6].tolist() == [7.0] * 5 + [0.0]


def test_shapes_without_elements() -> None:
    assert lazy_empty((2, 0, 3), torch.int64).shape == (2, 0, 3)


@given(st.lists(st.tuples(st.integers(0, 3 * PAGE), st.integers(0, 2 * PAGE)), max_size=6))
def test_pages_are_counted_once(gaps: list[tuple[int, int]]) -> None:
    spans, place = [], 0
    for gap, length in gaps:
        spans.append((place + gap, place + gap + length))
        place = spans[-1][1]
    pages = {
        byte // PAGE
        for start, end in spans
        for byte in {*range(start, end, PAGE // 2), end - 1}
        if end > start
    }
    assert pages_touched(spans) == len(pages)
