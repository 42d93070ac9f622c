"""torchweld::cached_rows against a loop, and torchweld::causal_convolution against torch."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.ops.test_cached_attention import draw_path
from torchweld.graph.ops.cached_attention import append_rows
from torchweld.graph.ops.cached_rows import cached_rows
from torchweld.graph.ops.causal_convolution import causal_convolution

FEATURES = 3


def chain_of(path: Tensor | None, sequence: int, row: int) -> list[int]:
    """The new rows from the root to `row`."""
    if path is None:
        return list(range(row + 1))
    return [int(above) for above in path[sequence, row] if above >= 0]


def paths(batch: int, count: int, seed: int) -> Tensor:
    return torch.cat([draw_path(count, seed + b) for b in range(batch)])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=3), count=st.integers(1, 5), taps=st.integers(1, 4),
    dilation=st.integers(1, 3), spare=st.integers(0, 4), tree=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_rows_are_those_of_a_loop(
    lengths: list[int], count: int, taps: int, dilation: int, spare: int, tree: bool, seed: int
) -> None:
    batch, draw = len(lengths), torch.Generator().manual_seed(seed)
    text = torch.randn(batch, max(lengths) + 1, FEATURES, generator=draw)
    new = torch.randn(batch, 1, count, FEATURES, generator=draw)
    capacity = (taps - 1) * dilation + count + spare
    cache = torch.full((batch, 1, capacity, FEATURES), math.nan)
    for b, length in enumerate(lengths):
        for place in range(length):
            cache[b, 0, place % capacity] = text[b, place]
    past = torch.tensor(lengths)
    path = paths(batch, count, seed) if tree else None
    chains = [[chain_of(path, b, t) for t in range(count)] for b in range(batch)]
    positions = torch.tensor(
        [[lengths[b] + len(chains[b][t]) - 1 for t in range(count)] for b in range(batch)]
    )
    found = cached_rows(append_rows(cache, new, past), past, positions, path, taps, dilation)
    assert found.shape == (batch, count, taps, FEATURES)
    for b, length in enumerate(lengths):
        for t in range(count):
            seen = [*text[b, :length], *(new[b, 0, row] for row in chains[b][t])]
            for tap in range(taps):
                place = len(seen) - 1 - (taps - 1 - tap) * dilation
                expected = seen[place] if place >= 0 else torch.zeros(FEATURES)
                assert torch.equal(found[b, t, tap], expected)


ROWS: dict[str, Any] = {
    "cache": torch.zeros(2, 1, 8, 3), "past": torch.zeros(2, dtype=torch.int64),
    "positions": torch.zeros(2, 2, dtype=torch.int64), "path": None, "taps": 2, "dilation": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": torch.zeros(2, 2, 8, 3)}, "the cache is (2, 2, 8, 3), expected [B, 1, C, F]"),
        ({"past": torch.zeros(2)}, "past is torch.float32 of rank 1; expected int64 [B]"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions are torch.int64 of rank 1"),
        ({"path": torch.zeros(2, 2)}, "path is torch.float32 of rank 2"),
        ({"taps": 0}, "0 taps with dilation 1"),
        ({"dilation": 0}, "2 taps with dilation 0"),
    ],
)
def test_bad_reads_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cached_rows(**{**ROWS, **changed})


@settings(max_examples=30, deadline=None)
@given(
    taps=st.integers(1, 4), dilation=st.integers(1, 3), groups=st.integers(1, 3), times=st.integers(1, 2),
    inputs=st.integers(1, 2), length=st.integers(1, 9), biased=st.booleans(),
)  # fmt: skip
def test_causal_convolution_is_a_sum_over_what_was(
    taps: int, dilation: int, groups: int, times: int, inputs: int, length: int, biased: bool
) -> None:
    draw = torch.Generator().manual_seed(taps + 7 * length)
    x = torch.randn(2, groups * inputs, length, generator=draw, dtype=torch.float64)
    weight = torch.randn(groups * times, inputs, taps, generator=draw, dtype=torch.float64)
    bias = torch.randn(groups * times, generator=draw, dtype=torch.float64) if biased else None
    found = causal_convolution(x, weight, bias, dilation, groups)
    for out in range(groups * times):
        group = x[:, out // times * inputs : (out // times + 1) * inputs]
        for t in range(length):
            total = torch.zeros(2, dtype=torch.float64) if bias is None else bias[out].expand(2)
            for tap in range(taps):
                place = t - (taps - 1 - tap) * dilation
                if place >= 0:
                    total = total + group[:, :, place] @ weight[out, :, tap]
            torch.testing.assert_close(found[:, out, t], total)


def test_causal_convolution_refuses_what_does_not_fit() -> None:
    x, weight = torch.zeros(1, 4, 5), torch.zeros(4, 2, 3)
    with pytest.raises(ValueError, match="4 channels in 1 groups for a weight"):
        causal_convolution(x, weight, None, 1, 1)
    with pytest.raises(ValueError, match="ranks 2 and 3"):
        causal_convolution(x[0], weight, None, 1, 2)
    with pytest.raises(ValueError, match="dilation 0"):
        causal_convolution(x, weight, None, 0, 2)
    assert (
        causal_convolution(x, weight, None, 1, 2).shape == F.conv1d(F.pad(x, (2, 0)), weight, groups=2).shape
    )
