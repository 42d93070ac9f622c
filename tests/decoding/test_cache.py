"""The cache by itself: full and ring layouts against a list of positions, memory, and every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchweld.decoding.cache import Cache, CacheError
from torchweld.passes.rewrite_kv_cache import LayerState

WINDOW, SPARE = 5, 4


def state(window: int = 0, heads: int = 2) -> LayerState:
    return LayerState("attention", "window" if window else "causal", window, heads, 3, 2, torch.float32, "")


STATES = (state(), state(WINDOW, heads=1))


def feed(cache: Cache, counts: list[int], rows: int, value: float, tree: list[int] | None = None) -> None:
    """Write `rows` rows per sequence as a step does: row t of sequence b holds value + 100 b + t."""
    cache.check_room(counts)
    cache.reserve([rows] * cache.batch)
    cache.will_write([rows] * cache.batch)
    for tensor in cache.tensors():
        capacity = tensor.shape[2]
        for b, length in enumerate(cache.lengths):
            for t in range(rows):
                tensor[b, :, (length + t) % capacity] = value + 100 * b + t
    cache.advance(counts, tree)
    cache.settle()


def held(tensor: Tensor, sequence: int, positions: range) -> list[float]:
    capacity = tensor.shape[2]
    return [float(tensor[sequence, 0, j % capacity, 0]) for j in positions]


def bits(cache: Cache) -> list[Tensor]:
    """Everything in memory, also what was never written."""
    return [tensor.clone().view(torch.int32) for tensor in cache.tensors()]


def same(before: list[Tensor], cache: Cache) -> bool:
    return all(torch.equal(left, right) for left, right in zip(before, bits(cache), strict=True))


class Text:
    """What was fed, position by position, beside the cache."""

    def __init__(self, batch: int) -> None:
        self.cache = Cache(STATES, batch, spare=SPARE)
        self.texts: list[list[float]] = [[] for _ in range(batch)]
        self.calls = 0

    def feed(self, counts: list[int], padding: int) -> None:
        self.calls += 1
        value = 1000.0 * self.calls
        feed(self.cache, counts, max(counts) + padding, value)
        for b, count in enumerate(counts):
            self.texts[b] += [value + 100 * b + t for t in range(count)]

    def truncate(self, wanted: list[int]) -> bool:
        lengths = [min(new, len(text)) for new, text in zip(wanted, self.texts, strict=True)]
        try:
            removed = self.cache.truncate(lengths)
        except CacheError:
            return False
        assert removed == tuple(len(text) - new for new, text in zip(lengths, self.texts, strict=True))
        self.texts = [text[:new] for new, text in zip(lengths, self.texts, strict=True)]
        return True

    def check(self) -> None:
        """All positions in the full layer; in the ring those that the next row sees."""
        assert self.cache.lengths == tuple(map(len, self.texts))
        wide_key, wide_value, ring_key, ring_value = self.cache.tensors()
        for b, text in enumerate(self.texts):
            everything = range(len(text))
            for tensor in (wide_key, wide_value):
                assert held(tensor, b, everything) == text
            visible = range(max(0, len(text) - WINDOW + 1), len(text))
            for tensor in (ring_key, ring_value):
                assert held(tensor, b, visible) == text[visible.start :]


SPLIT = st.tuples(st.lists(st.integers(0, 13), min_size=2, max_size=2), st.integers(0, 3), st.integers(0, 9))


@settings(max_examples=60)
@given(turns=st.lists(SPLIT, min_size=1, max_size=9))
def test_what_was_fed_is_there(turns: list[tuple[list[int], int, int]]) -> None:
    """Steps of any size and padding, and rolling back, for two sequences; several turns of the ring."""
    text = Text(2)
    for counts, padding, back in turns:
        text.feed(counts, padding)
        text.check()
        text.truncate([len(kept) - back if len(kept) >= back else len(kept) for kept in text.texts])
        text.check()


def test_a_ring_can_always_go_back_by_what_it_has_to_spare() -> None:
    text = Text(1)
    for _ in range(40):
        text.feed([1], 0)
    assert text.truncate([len(text.texts[0]) - SPARE])
    text.check()
    before = bits(text.cache)
    message = "kept those from 31 on: go back less far"
    with pytest.raises(CacheError, match=message):
        text.cache.truncate(30)
    assert text.cache.lengths == (36,)
    assert same(before, text.cache)
    assert text.cache.truncate(0) == (36,), "nothing is read again from an empty cache"


def test_an_emptied_sequence_begins_anew() -> None:
    text = Text(2)
    text.feed([40, 40], 0)
    assert text.truncate([0, 38])
    text.feed([3, 9], 0)
    text.feed([70, 70], 2)
    text.check()


def test_a_long_step_leaves_the_ring_at_its_size() -> None:
    text = Text(1)
    text.feed([200], 0)
    assert text.cache.tensors()[2].shape[2] == WINDOW + SPARE
    text.feed([50], 7)
    assert text.cache.tensors()[2].shape[2] == WINDOW + SPARE
    text.check()


@pytest.mark.parametrize("rows", [1, 3])
def test_memory_stays_near_the_minimum(rows: int) -> None:
    wide, narrow = state(), state(70, heads=1)
    cache = Cache((wide, narrow), 2, spare=3)
    for length in range(rows, 900, rows):
        feed(cache, [rows, rows], rows, 0.0)
        least = 2 * (length * wide.bytes_per_token + min(length, 73) * narrow.bytes_per_token)
        if length > 64:
            assert least <= cache.nbytes <= 1.05 * least, length
    assert cache.tensors()[2].shape[2] == 73


def test_a_large_cache_grows_in_place_and_takes_the_pages_that_it_fills() -> None:
    wide = LayerState("attention", "causal", 0, 3, 64, 64, torch.float32, "")
    cache = Cache((wide, wide), 2)
    feed(cache, [600, 300], 600, 1.0)
    pointer = cache.tensors()[0].data_ptr()
    for length in range(600, 1000):
        feed(cache, [1, 0], 1, 2.0)
        # 16 slots of a head lie on a page; the second sequence wrote 600 rows, padding among them.
        pages = -(-(length + 1) // 16) + -(-600 // 16)
        assert cache.nbytes == 2 * 2 * 3 * pages * 4096
    assert cache.tensors()[0].data_ptr() == pointer
    branch = cache.fork()
    assert branch.nbytes == 2 * 2 * 3 * (-(-1000 // 16) + -(-300 // 16)) * 4096
    assert torch.equal(branch.tensors()[1][0, :, :1000], cache.tensors()[1][0, :, :1000])


def test_a_large_ring_has_its_size_from_the_start_and_takes_the_pages_that_it_fills() -> None:
    narrow = LayerState("attention", "sliding", 100, 1, 64, 64, torch.float32, "")
    cache = Cache((narrow,), 2, spare=28)
    for length in range(0, 300, 7):
        feed(cache, [7, 7], 7, 1.0)
        assert cache.tensors()[0].shape[2] == 128
        assert cache.nbytes == 2 * 2 * 4096 * -(-min(length + 7, 128) // 16)
    assert torch.equal(cache.fork().tensors()[1], cache.tensors()[1])


def test_memory_never_passes_the_limit() -> None:
    cache = Cache(STATES, 1, max_length=70, spare=SPARE)
    feed(cache, [66], 66, 0.0)
    for _ in range(4):
        feed(cache, [1], 1, 0.0)
    assert cache.nbytes <= 70 * STATES[0].bytes_per_token + (WINDOW + SPARE) * STATES[1].bytes_per_token


def test_memory_up_front() -> None:
    cache = Cache(STATES, 2, max_length=300, spare=SPARE, up_front=True)
    before = cache.nbytes
    assert before == 2 * (300 * STATES[0].bytes_per_token + (WINDOW + SPARE) * STATES[1].bytes_per_token)
    pointer = cache.tensors()[0].data_ptr()
    for _ in range(300):
        feed(cache, [1, 1], 1, 0.0)
    assert (cache.nbytes, cache.tensors()[0].data_ptr()) == (before, pointer)


def test_layers_come_in_their_order() -> None:
    states = (state(7, heads=1), state(heads=2), state(7, heads=3), state(heads=4))
    assert [tensor.shape[1] for tensor in Cache(states, 1).tensors()] == [1, 1, 2, 2, 3, 3, 4, 4]


def feed_tree(cache: Cache, parents: list[int]) -> None:
    feed(cache, [len(parents)], len(parents), 500.0, parents)


@settings(max_examples=40)
@given(past=st.integers(0, 30), parents=st.lists(st.integers(0, 6), min_size=1, max_size=7), pick=st.data())
def test_keep_moves_a_path_to_the_next_positions(past: int, parents: list[int], pick: Any) -> None:
    tree = [min(parent, row) - 1 for row, parent in enumerate(parents)]
    text = Text(1)
    for _ in range(past):
        text.feed([1], 0)
    feed_tree(text.cache, tree)
    path: list[int] = []
    while True:
        children = [row for row, parent in enumerate(tree) if parent == (path[-1] if path else -1)]
        row = pick.draw(st.sampled_from([None, *children])) if children else None
        if row is None:
            break
        path.append(row)
    text.cache.keep(path)
    text.texts[0] += [500.0 + row for row in path]
    text.check()


def test_a_tree_waits_for_its_path() -> None:
    cache = Cache(STATES, 1)
    feed(cache, [6], 6, 0.0)
    feed_tree(cache, [-1, 0, 0, 1])
    assert cache.lengths == (10,)
    with pytest.raises(CacheError, match="keep a path of it"):
        cache.check_room([1])
    with pytest.raises(CacheError, match=re.escape("rows [0, 3] are no path from the root")):
        cache.keep([0, 3])
    with pytest.raises(CacheError, match="the newest rows are a tree"):
        cache.truncate(9)
    assert cache.lengths == (10,) and cache.tree == (-1, 0, 0, 1)
    assert cache.fork().truncate(8) == (2,), "rows 0 and 1 are a chain"
    assert cache.truncate(6) == (4,)
    cache.check_room([1])
    with pytest.raises(CacheError, match="no tree of rows"):
        cache.keep([0])


def test_a_chain_needs_no_keep() -> None:
    cache = Cache(STATES, 1)
    feed(cache, [3], 3, 0.0)
    feed_tree(cache, [-1, 0, 1])
    cache.check_room([1])
    fork = cache.fork()
    fork.keep([0, 1])
    assert (fork.lengths, cache.lengths) == ((5,), (6,))


def test_fork_is_independent() -> None:
    text = Text(2)
    text.feed([9, 4], 0)
    fork = text.cache.fork()
    before = bits(fork)
    text.feed([3, 3], 0)
    assert fork.lengths == (9, 4)
    assert same(before, fork)
    text.check()


def test_part_of_the_batch_grows_alone() -> None:
    cache = Cache(STATES, 3)
    cache.reserve([0, 200, 0])
    cache.will_write([0, 200, 0])
    cache.advance([0, 200, 0])
    cache.settle()
    cache.reserve([150, 0, 0])
    assert cache.tensors()[0].shape[2] <= 210, "the longest sequence counts, not the sum"
    assert cache.tensors(1, 2)[0].shape[0] == 1 and cache.tensors(1, 2)[0].is_contiguous()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "for 0 sequences"),
        ({"batch": 1, "max_length": 0}, "at most 0 positions"),
        ({"batch": 1, "up_front": True}, "give a max_length"),
        ({"batch": 1, "spare": -1}, "-1 rows beyond its window"),
    ],
)
def test_impossible_caches_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        Cache(STATES, **options)


def test_errors_change_nothing() -> None:
    cache = Cache(STATES, 2, max_length=12)
    feed(cache, [7, 3], 7, 0.0)
    before = bits(cache)
    with pytest.raises(
        CacheError, match="sequence 0: 7 positions and 6 new ones are more than the limit of 12"
    ):
        cache.check_room([6, 9])
    with pytest.raises(CacheError, match="1 sequences for a cache of 2"):
        cache.check_room([1])
    for wanted, message in (
        (8, "sequence 0: cannot truncate 7 positions to 8"),
        ([7, -1], "sequence 1: cannot truncate 3 positions to -1"),
        ([1, 2, 3], "3 lengths for a cache of 2"),
    ):
        with pytest.raises(CacheError, match=message):
            cache.truncate(wanted)  # type: ignore[arg-type]
    assert cache.lengths == (7, 3)
    assert same(before, cache)
