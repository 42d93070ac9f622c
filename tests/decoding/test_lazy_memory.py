"""Memory handed out page by page."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.lazy_memory import MOST_KEPT, PAGE, lazy_empty, outgrown, pages_touched


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * PAGE


def test_only_what_is_written_is_taken() -> None:
    before = resident_bytes()
    tensor = lazy_empty((2, 64, 1 << 20), torch.float32)
    tensor[1, 3, :5] = 7.0
    assert resident_bytes() - before < tensor.nbytes // 100
    assert tensor[1, 3, :5].tolist() == [7.0] * 5


def test_what_a_fork_writes_is_its_own() -> None:
    tensor = lazy_empty((8, PAGE), torch.uint8)
    tensor[3] = 1
    memory = tensor.numpy()
    child = os.fork()
    if child == 0:
        memory[3, 0] = 2
        os._exit(int(memory[3, 0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert int(tensor[3, 0]) == 1


def test_shapes_without_elements() -> None:
    assert lazy_empty((2, 0, 3), torch.int64).shape == (2, 0, 3)


def test_memory_serves_again_once_nobody_holds_it() -> None:
    shape = (3, PAGE)
    first = lazy_empty(shape, torch.float32)
    place, part = first.data_ptr(), first[1:].view(-1)
    del first
    assert lazy_empty(shape, torch.float32).data_ptr() != place, "a view is still held"
    lazy_empty((5, PAGE), torch.float32)  # of another size: what waits for this one is given up
    part.fill_(3.0)
    del part
    again = lazy_empty(shape, torch.float32)
    assert (again.data_ptr(), again[2, 0].item()) == (place, 3.0)


def test_what_was_outgrown_or_is_too_much_goes_back_to_the_system() -> None:
    for outgrew, nbytes in ((True, 7 * PAGE), (False, MOST_KEPT + PAGE)):
        tensor = lazy_empty((nbytes,), torch.uint8)
        tensor[0] = 5
        with outgrown() if outgrew else nullcontext():
            del tensor
        assert lazy_empty((nbytes,), torch.uint8)[0] == 0


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
