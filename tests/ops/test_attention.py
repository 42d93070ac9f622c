"""torchweld::attention against torch's own scaled_dot_product_attention and hand-written formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchweld.graph.ops.attention import attention, positional_visibility


def heads(
    batch: int, count: int, length: int, size: int, seed: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(
        batch, count, length, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, kind: str = "none", **options: float
) -> Tensor:
    given_options = {"window": 0, "scale": 1 / math.sqrt(q.shape[-1]), "soft_cap": 0.0, **options}
    return attention(
        q, k, v, mask, kind, int(given_options["window"]), given_options["scale"], given_options["soft_cap"]
    )


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    queries=st.integers(1, 7),
    extra=st.integers(0, 5),
    kind=st.sampled_from(["none", "causal", "window"]),
    window=st.integers(1, 6),
    masked=st.sampled_from(["no", "bool", "float"]),
    seed=st.integers(0, 1000),
)
def test_equals_torch(
    batch: int,
    groups: int,
    key_heads: int,
    queries: int,
    extra: int,
    kind: str,
    window: int,
    masked: str,
    seed: int,
) -> None:
    keys = queries + extra
    q = heads(batch, groups * key_heads, queries, 4, seed)
    k, v = heads(batch, key_heads, keys, 4, seed + 1), heads(batch, key_heads, keys, 5, seed + 2)
    distance = torch.arange(queries)[:, None] + extra - torch.arange(keys)[None, :]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if kind != "none":
        visible = distance >= 0
    if kind == "window":
        visible &= distance < window
    generator = torch.Generator().manual_seed(seed)
    mask = None
    combined: Tensor = visible
    if masked == "bool":
        mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.6
        combined = visible & mask
    elif masked == "float":
        mask = torch.randn(1, groups * key_heads, queries, keys, generator=generator, dtype=torch.float64)
        combined = mask.masked_fill(~visible, -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=combined, enable_gqa=True)
    found = call(q, k, v, mask, kind, window=window)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_fully_masked_row_is_zero_and_others_are_not() -> None:
    q, k, v = (heads(1, 1, 4, 4, seed) for seed in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    found = call(q, k, v, mask)
    assert torch.equal(found[0, 0, 2], torch.zeros(4, dtype=torch.float64))
    assert (found[0, 0, [0, 1, 3]].abs().sum(-1) > 0).all()


def test_more_queries_than_keys_leaves_the_first_rows_empty() -> None:
    q, k, v = heads(1, 1, 5, 4, 0), heads(1, 1, 3, 4, 1), heads(1, 1, 3, 4, 2)
    found = call(q, k, v, kind="causal")
    assert torch.equal(found[0, 0, :2], torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(found[0, 0, 2], v[0, 0, 0])


def test_soft_cap_bends_the_scores_before_the_mask() -> None:
    q, k, v = (heads(1, 2, 6, 4, seed) * 4 for seed in range(3))
    scores = 3.0 * torch.tanh(q @ k.transpose(-1, -2) * 0.5 / 3.0)
    scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(call(q, k, v, kind="causal", scale=0.5, soft_cap=3.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    q, k, v = (heads(2, 2, 9, 8, seed, dtype) for seed in range(3))
    expected = call(q.float(), k.float(), v.float(), kind="causal").to(dtype)
    assert torch.equal(call(q, k, v, kind="causal"), expected)


def test_no_keys_gives_zeros() -> None:
    found = call(heads(1, 2, 3, 4, 0), heads(1, 2, 0, 4, 1), heads(1, 2, 0, 4, 2))
    assert torch.equal(found, torch.zeros(1, 2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("shapes", "kind", "window", "message"),
    [
        (((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "none", 0, "rank 4"),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 5, 4)), "none", 0, "differ in heads or length"),
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)), "none", 0, "key has 5"),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "none", 0, "3 query heads cannot be shared out over 2"),
        (
            ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)),
            "prefix",
            0,
            "'prefix' is not one of none, causal, window",
        ),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "window", 0, "window must be at least 1"),
    ],
)
def test_bad_arguments_are_named(
    shapes: tuple[tuple[int, ...], ...], kind: str, window: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(*(torch.zeros(shape) for shape in shapes), kind=kind, window=window)


@pytest.mark.parametrize(
    "sinks",
    [torch.zeros(3), torch.zeros(1, 4), torch.zeros(4, dtype=torch.int64)],
    ids=["too few", "rank", "integers"],
)
def test_bad_sinks_are_named(sinks: Tensor) -> None:
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="one floating-point number for each of the 4 query heads"):
        attention(q, k, k, None, "none", 0, 0.5, 0.0, sinks)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_a_sink_is_a_key_whose_value_is_zero(soft_cap: float) -> None:
    """Written as one more key: its score is not scaled, capped or hidden."""
    q, k, v = heads(2, 4, 5, 8, 0), heads(2, 4, 5, 8, 1), heads(2, 4, 5, 3, 2)
    sinks = torch.tensor([0.5, -1.0, 40.0, -math.inf], dtype=torch.float64)
    scores = q @ k.mT * 0.5
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    weights = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1).softmax(-1)
    expected = weights @ torch.cat([v, torch.zeros(2, 4, 1, 3, dtype=torch.float64)], 2)
    found = attention(q, k, v, None, "causal", 0, 0.5, soft_cap, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing_gives_zero_beside_any_sink() -> None:
    q, k, v = heads(1, 2, 5, 4, 0), heads(1, 2, 3, 4, 1), heads(1, 2, 3, 4, 2)
    for sink in (3.0, -math.inf):
        sinks = torch.full((2,), sink, dtype=torch.float64)
        found = attention(q, k, v, None, "causal", 0, 0.5, 0.0, sinks)
        assert torch.equal(found[0, :, :2], torch.zeros(2, 2, 4, dtype=torch.float64))
        assert (found[0, :, 2:] != 0).all()


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.torchweld.attention(q, k, v, None, "causal", 0, 0.5, 0.0)


def test_exports_with_symbolic_sizes() -> None:
    auto = torch.export.Dim.AUTO
    inputs = heads(2, 4, 5, 8, 0), heads(2, 2, 7, 8, 1), heads(2, 2, 7, 3, 2)
    exported = torch.export.export(
        Attend(), inputs, dynamic_shapes=({0: auto, 2: auto}, {0: auto, 2: auto}, {0: auto, 2: auto})
    )
    (node,) = exported.graph.find_nodes(op="call_function", target=torch.ops.torchweld.attention.default)
    value = node.meta["val"]
    assert [isinstance(size, int) for size in value.shape] == [False, True, False, True]
    assert value.shape[3] == 3 and value.dtype == torch.float64
    other = heads(3, 4, 2, 8, 3), heads(3, 2, 11, 8, 4), heads(3, 2, 11, 3, 5)
    assert torch.equal(exported.module()(*other), Attend()(*other))


def test_passes_torch_opcheck() -> None:
    arguments = (
        heads(1, 4, 3, 4, 0),
        heads(1, 2, 3, 4, 1),
        heads(1, 2, 3, 4, 2),
        None,
        "window",
        2,
        0.5,
        1.0,
    )
    torch.library.opcheck(torch.ops.torchweld.attention.default, arguments)
    torch.library.opcheck(torch.ops.torchweld.attention.default, (*arguments, torch.zeros(4)))


def test_positional_visibility_by_hand() -> None:
    found = positional_visibility("window", 2, 4, 2, torch.device("cpu"))
    assert found is not None
    assert found.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert positional_visibility("none", 2, 4, 0, torch.device("cpu")) is None
