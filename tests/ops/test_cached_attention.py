"""torchweld::append_rows and torchweld::cached_attention against loops over positions and torchweld::attention."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchweld.graph.ops.attention import attention
from torchweld.graph.ops.cached_attention import append_rows, cached_attention

SCALE = 0.4


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_path(count: int, seed: int) -> Tensor:
    """A random tree: every row hangs on an earlier one, or on the cached text."""
    choose = torch.Generator().manual_seed(seed)
    chains: list[list[int]] = []
    for row in range(count):
        parent = int(torch.randint(-1, row, (), generator=choose)) if row else -1
        chains.append([*(chains[parent] if parent >= 0 else []), row])
    return torch.tensor([chain + [-1] * (count - len(chain)) for chain in chains]).reshape(1, count, count)


def by_hand(
    query: Tensor, keys: Tensor, values: Tensor, positions: list[int], soft_cap: float, bias: Tensor | None,
    sink: Tensor | None,
) -> Tensor:  # fmt: skip
    """One query head row [D] over the listed positions of keys [S, D] and values [S, Dv]."""
    scores = torch.stack([query @ keys[j] for j in positions]) * SCALE
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias[positions]
    total = scores.exp().sum() + (0 if sink is None else sink.exp())
    return scores.exp() / total @ values[positions]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=3),
    count=st.integers(1, 5),
    groups=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    window=st.integers(0, 6),
    spare=st.integers(0, 4),
    tree=st.booleans(),
    biased=st.booleans(),
    soft_cap=st.sampled_from([0.0, 1.5]),
    sunk=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_a_loop_over_positions(
    lengths: list[int], count: int, groups: int, key_heads: int, window: int, spare: int, tree: bool,
    biased: bool, soft_cap: float, sunk: bool, seed: int,
) -> None:  # fmt: skip
    """Rings are filled row by row as decoding does, then the new rows come at once, as a chain or as a tree."""
    batch, heads = len(lengths), groups * key_heads
    capacity = (window + count - 1 if window else max(lengths) + count) + spare
    past = torch.tensor(lengths)
    text = draw(batch, key_heads, max(lengths) + count, 4, seed=seed)
    cache = torch.full((batch, key_heads, capacity, 4), math.nan, dtype=torch.float64)
    for b, length in enumerate(lengths):
        for j in range(length):
            cache[b, :, j % capacity] = text[b, :, j]
    new = draw(batch, key_heads, count, 4, seed=seed + 1)
    cache = append_rows(cache, new, past)
    query = draw(batch, heads, count, 4, seed=seed + 2)
    path = torch.cat([draw_path(count, seed + b) for b in range(batch)]) if tree else None
    bias = draw(1, heads, 1, max(lengths) + count, seed=seed + 3) if biased and not window else None
    kind = "window" if window else "causal"
    sinks = draw(heads, seed=seed + 4) if sunk else None
    found = cached_attention(query, cache, cache, past, path, bias, kind, window, SCALE, soft_cap, sinks)
    for b, length in enumerate(lengths):
        for t in range(count):
            chain = list(range(t + 1)) if path is None else [int(row) for row in path[b, t] if row >= 0]
            last = length + len(chain) - 1
            seen = list(range(max(0, last - window + 1) if window else 0, last + 1))
            for h in range(heads):
                rows = torch.cat([text[b, h // groups, :length], new[b, h // groups, chain]])
                offset = None if bias is None else bias[0, h, 0]
                sink = None if sinks is None else sinks[h]
                expected = by_hand(query[b, h, t], rows, rows, seen, soft_cap, offset, sink)
                torch.testing.assert_close(found[b, h, t], expected, rtol=1e-12, atol=1e-12)


def test_without_a_past_it_is_attention() -> None:
    query, key, value = draw(2, 4, 6, 8, seed=0), draw(2, 2, 6, 8, seed=1), draw(2, 2, 6, 3, seed=2)
    past = torch.zeros(2, dtype=torch.int64)
    for kind, window in (("causal", 0), ("window", 3)):
        expected = attention(query, key, value, None, kind, window, SCALE, 0.0)
        found = cached_attention(query, key, value, past, None, None, kind, window, SCALE, 0.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_bool_mask_hides_positions() -> None:
    query, key = draw(1, 2, 2, 4, seed=0), draw(1, 2, 7, 4, seed=1)
    visible = torch.tensor([True, False, True, True, False, True, True])
    found = cached_attention(query, key, key, torch.tensor([5]), None, visible, "causal", 0, SCALE, 0.0)
    expected = attention(query, key, key, visible.expand(1, 1, 2, 7), "causal", 0, SCALE, 0.0)
    assert torch.equal(found, expected)
    nothing = cached_attention(
        query, key, key, torch.tensor([5]), None, torch.zeros(1, dtype=torch.bool), "causal", 0, SCALE, 0.0
    )
    assert torch.equal(nothing, torch.zeros_like(nothing)), "a row that sees nothing is zero"


def test_append_wraps_around_and_leaves_the_cache_alone() -> None:
    cache = torch.zeros(2, 1, 4, 1)
    found = append_rows(
        cache, torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1).expand(2, 1, 3, 1), torch.tensor([0, 6])
    )
    assert found.flatten(1).tolist() == [[1, 2, 3, 0], [3, 0, 1, 2]]
    assert torch.equal(cache, torch.zeros(2, 1, 4, 1))


@pytest.mark.parametrize(
    ("rows", "past", "message"),
    [
        (torch.zeros(1, 2, 5, 3), torch.zeros(1, dtype=torch.int64), "5 rows for a cache of 4 slots"),
        (torch.zeros(1, 2, 1, 3), torch.zeros(1), "past torch.float32"),
        (
            torch.zeros(1, 2, 1, 3).double(),
            torch.zeros(1, dtype=torch.int64),
            "rows torch.float64 for a cache",
        ),
        (torch.zeros(1, 1, 1, 3), torch.zeros(1, dtype=torch.int64), "differ in heads or features"),
        (torch.zeros(1, 2, 3), torch.zeros(1, dtype=torch.int64), "ranks (4, 3, 1)"),
        (torch.zeros(2, 2, 1, 3), torch.zeros(1, dtype=torch.int64), "2 sequences of rows and 1 lengths"),
    ],
)
def test_append_names_a_bad_argument(rows: Tensor, past: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        append_rows(torch.zeros(1, 2, 4, 3), rows, past)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_kind": "none"}, "'none' is not one of causal, window"),
        ({"mask_kind": "window"}, "window must be at least 1"),
        ({"mask_kind": "window", "window": 2, "mask": torch.zeros(4)}, "no place in a ring"),
        ({"past": torch.zeros(1)}, "past is torch.float32 of rank 1"),
        ({"path": torch.zeros(1, 1, dtype=torch.int64)}, "path is torch.int64 of rank 2"),
        ({"query": torch.zeros(2, 1, 3)}, "got ranks (3, 4, 4)"),
        ({"query": torch.zeros(1, 2, 1, 5)}, "differ in features"),
        ({"query": torch.zeros(1, 3, 1, 3)}, "3 query heads cannot be shared out over 2"),
        ({"sinks": torch.zeros(1)}, "expected one floating-point number for each of the 2 query heads"),
    ],
)
def test_attention_names_a_bad_argument(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(1, 2, 1, 3), "key": torch.zeros(1, 2, 4, 3), "value": torch.zeros(1, 2, 4, 3),
        "past": torch.zeros(1, dtype=torch.int64), "path": None, "mask": None, "mask_kind": "causal", "window": 0,
        "scale": 1.0, "soft_cap": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        cached_attention(**(arguments | changes))  # type: ignore[arg-type]


def test_passes_torch_opcheck() -> None:
    cache, past = torch.zeros(2, 2, 6, 4), torch.tensor([3, 1])
    torch.library.opcheck(
        torch.ops.torchweld.append_rows.default, (cache, draw(2, 2, 2, 4, seed=0).float(), past)
    )
    query = draw(2, 4, 2, 4, seed=1).float()
    arguments = (query, cache, cache, past, None, None, "window", 4, SCALE, 0.0)
    torch.library.opcheck(torch.ops.torchweld.cached_attention.default, arguments)
    torch.library.opcheck(torch.ops.torchweld.cached_attention.default, (*arguments, torch.zeros(4)))
