"""torchweld::cached_running against loops, and against torch's own cumulative functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.ops.test_cached_rows import FEATURES, chain_of, paths
from torchweld.graph.ops.cached_running import KINDS, cached_running, neutral_value

COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "product": lambda a, b: a * b,
    "logsumexp": torch.logaddexp,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.cumsum(0),
    "product": lambda x: x.cumprod(0),
    "logsumexp": lambda x: x.logcumsumexp(0),
    "maximum": lambda x: x.cummax(0).values,
    "minimum": lambda x: x.cummin(0).values,
}
DTYPES = (torch.float32, torch.float64, torch.int64)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), count=st.integers(1, 6), spare=st.integers(1, 4),
    tree=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_values_are_those_of_a_loop_to_the_bit(
    kind: str, dtype: torch.dtype, lengths: list[int], count: int, spare: int, tree: bool, seed: int
) -> None:
    if kind == "logsumexp" and dtype == torch.int64:
        dtype = torch.float32
    batch, draw = len(lengths), torch.Generator().manual_seed(seed)
    capacity = count + spare
    cache = (9 * torch.randn(batch, 1, capacity, FEATURES, generator=draw)).to(dtype)
    rows = (9 * torch.randn(batch, 1, count, FEATURES, generator=draw)).to(dtype)
    path = paths(batch, count, seed) if tree else None
    found = cached_running(cache, rows, torch.tensor(lengths), path, kind)
    assert found.dtype == dtype
    neutral = torch.full((FEATURES,), neutral_value(kind, dtype), dtype=dtype)
    for b, length in enumerate(lengths):
        start = cache[b, 0, (length - 1) % capacity] if length else neutral
        for t in range(count):
            value = start
            for row in chain_of(path, b, t):
                value = COMBINE[kind](value, rows[b, 0, row])
            assert torch.equal(found[b, 0, t], value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [0.0, math.inf, -math.inf, math.nan])
def test_a_text_from_its_beginning_is_torchs_function(kind: str, special: float) -> None:
    """The first row needs no slot; what is special stays, or does not, as in torch."""
    rows = torch.randn(1, 1, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows[0, 0, 4, 1:3] = special
    found = cached_running(torch.empty(1, 1, 0, 5, dtype=torch.float64), rows, torch.tensor([0]), None, kind)
    torch.testing.assert_close(found[0, 0], WHOLE[kind](rows[0, 0]), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [3, 37])
def test_a_sequence_has_the_same_bits_in_any_company(kind: str, features: int) -> None:
    """torch computes what is left over behind whole vectors with other code: neighbours must not move that border."""
    rows = torch.randn(5, 1, 1, features, generator=torch.Generator().manual_seed(2))
    cache, past = torch.randn(5, 1, 4, features), torch.tensor([3, 0, 7, 1, 2])
    together = cached_running(cache, rows, past, None, kind)
    for b in range(5):
        alone = cached_running(cache[b : b + 1], rows[b : b + 1], past[b : b + 1], None, kind)
        assert torch.equal(together[b : b + 1], alone)


def test_a_scan_in_log_space_kept_in_float64_is_torchs() -> None:
    """Sums of 2000 gates: kept in float32, this is 2e-3 off what torch gives for float32, and 3e-4 of its value."""
    draw = torch.Generator().manual_seed(0)
    gates, values = torch.randn(2, 2000, 16, generator=draw).unbind(0)
    coefficients, candidates = -F.softplus(gates), values - F.softplus(-gates)

    def running(x: Tensor, kind: str) -> Tensor:
        empty = torch.empty(1, 1, 0, 16, dtype=torch.float64)
        return cached_running(empty, x[None, None].double(), torch.tensor([0]), None, kind)[0, 0].float()

    so_far = running(coefficients, "sum")
    assert torch.equal(so_far, coefficients.cumsum(0))
    found = (so_far + running(candidates - so_far, "logsumexp")).exp()
    torch.testing.assert_close(
        found, (so_far + (candidates - so_far).logcumsumexp(0)).exp(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["maximum", "minimum"])
def test_extremes_of_any_dtype(kind: str, dtype: torch.dtype) -> None:
    rows = (9 * torch.randn(1, 1, 20, 3, generator=torch.Generator().manual_seed(3))).abs().floor().to(dtype)
    found = cached_running(torch.empty(1, 1, 1, 3, dtype=dtype), rows, torch.tensor([0]), None, kind)
    assert torch.equal(found[0, 0], WHOLE[kind](rows[0, 0]))


@pytest.mark.parametrize(
    ("cache", "rows", "kind", "message"),
    [
        (torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 2, 5), "sum", "rows (1, 1, 2, 5) for a cache (1, 1, 4, 3)"),
        (torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 2, 3).double(), "sum", "expected one dtype"),
        (torch.zeros(1, 1, 4, 3).half(), torch.zeros(1, 1, 2, 3).half(), "product", "one dtype of torch.float32"),
        (torch.zeros(1, 1, 4, 3).long(), torch.zeros(1, 1, 2, 3).long(), "logsumexp", "torch.float32, torch.float64"),
        (torch.zeros(1, 1, 4, 3).cfloat(), torch.zeros(1, 1, 2, 3).cfloat(), "maximum", "expected one real dtype"),
        (torch.zeros(1, 2, 4, 3), torch.zeros(1, 1, 2, 3), "sum", "the cache is (1, 2, 4, 3), expected [B, 1, C, F]"),
        (torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 2, 3), "mean", "kind 'mean' is not one of sum, product"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(cache: Tensor, rows: Tensor, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cached_running(cache, rows, torch.tensor([0]), None, kind)
