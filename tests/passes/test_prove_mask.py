"""prove_mask: only masks that are causal or a window for every size are called so."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tests.passes.support import Case, draw
from torchweld.graph.capture import capture
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, recognize_attention
from torchweld.passes.prove_mask import lower_bound

ATTENTION = torch.ops.torchweld.attention.default
MaskFunction = Callable[[int, int], Tensor]


def attention_of(
    mask: Callable[..., Any], length: int = 6, dynamic: bool = True, **weights: Tensor
) -> tuple[Case, fx.Node]:
    """The recognised attention of F.scaled_dot_product_attention(x, x, x, mask(m, x))."""

    def function(m: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask(m, x))

    case = Case(function, draw(2, length, 8), dynamic=dynamic, **weights)
    case.run(*CANONICALIZE, recognize_attention)
    return case, case.only(ATTENTION)


def kind(node: fx.Node) -> tuple[str, int, bool]:
    """(mask kind, window, is there a tensor mask)."""
    return str(node.args[4]), int(node.args[5]), node.args[3] is not None  # type: ignore[arg-type]


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]


def columns(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None, :]


def square(x: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=dtype)


def packed(m: Any, x: Tensor) -> Tensor:
    """Hugging Face's test for packed sequences, on plain positions."""
    positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
    sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(x.shape[0])[:, None, None, None]
    q, k = rows(x)[None, None], columns(x)[None, None]
    return (sequence[batch, q] == sequence[batch, k]) & (positions[batch, k] <= positions[batch, q])


CAUSAL: list[Callable[..., Any]] = [
    lambda m, x: columns(x) <= rows(x),
    lambda m, x: rows(x) >= columns(x),
    lambda m, x: ~(columns(x) > rows(x)),
    lambda m, x: columns(x) < rows(x) + 1,
    lambda m, x: (rows(x) - columns(x)) >= 0,
    lambda m, x: square(x).tril(),
    lambda m, x: ~square(x).triu(1),
    lambda m, x: square(x, torch.float64).tril() > 0,
    lambda m, x: square(x, torch.float64).tril().bool(),
    lambda m, x: torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype).triu(1),
    lambda m, x: torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(
        columns(x) > rows(x), -math.inf
    ),
    lambda m, x: (1.0 - square(x, torch.float64).tril()) * torch.finfo(torch.float64).min,
    lambda m, x: torch.where(columns(x) <= rows(x), 0.0, -1e30).to(x.dtype),
    lambda m, x: m.triangle[: x.shape[1], : x.shape[1]],
    lambda m, x: (columns(x) <= rows(x)) & square(x),
    lambda m, x: (columns(x) <= rows(x)) | (columns(x) < rows(x)),
    lambda m, x: (columns(x) <= rows(x))[None, None].expand(x.shape[0], 1, -1, -1),
    packed,
]


@pytest.mark.parametrize("mask", CAUSAL)
def test_causal_in_every_spelling(mask: Callable[..., Any]) -> None:
    case, node = attention_of(mask, triangle=torch.ones(32, 32, dtype=torch.bool).tril())
    assert kind(node) == ("causal", 0, False)
    assert "for every size" in node.meta["mask_proof"]
    for length in (1, 2, 9):
        case.assert_same_numbers(draw(1, length, 8, seed=length), exact=False)


@pytest.mark.parametrize(
    "mask",
    [
        lambda m, x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - 3),
        lambda m, x: square(x).tril() & square(x).triu(-2),
        lambda m, x: m.band[: x.shape[1], : x.shape[1]],
        lambda m, x: (rows(x) - columns(x) >= 0) & (rows(x) - columns(x) < 3),
        lambda m, x: (
            torch.where(square(x).tril(), 0.0, -math.inf).to(x.dtype)
            + torch.where(columns(x) > rows(x) - 3, 0.0, -math.inf).to(x.dtype)
        ),
    ],
)
def test_window_in_every_spelling(mask: Callable[..., Any]) -> None:
    band = torch.ones(32, 32, dtype=torch.bool).tril() & torch.ones(32, 32, dtype=torch.bool).triu(-2)
    case, node = attention_of(mask, band=band)
    assert kind(node) == ("window", 3, False)
    for length in (1, 2, 9):
        case.assert_same_numbers(draw(1, length, 8, seed=length), exact=False)


@pytest.mark.parametrize(
    "mask",
    [
        lambda m, x: columns(x) >= 0,
        lambda m, x: columns(x) < x.shape[1],
        lambda m, x: rows(x) + columns(x) >= 0,
        lambda m, x: square(x),
        lambda m, x: torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype),
    ],
)
def test_nothing_hidden(mask: Callable[..., Any]) -> None:
    case, node = attention_of(mask)
    assert kind(node) == ("none", 0, False)
    case.assert_same_numbers(draw(1, 9, 8), exact=False)


NOT_CAUSAL: list[Callable[..., Any]] = [
    lambda m, x: columns(x) < rows(x) + 2,
    lambda m, x: columns(x) < rows(x),
    lambda m, x: columns(x) >= rows(x),
    lambda m, x: (columns(x) <= rows(x)) | (columns(x) == 7),  # looks causal up to length 7
    lambda m, x: (columns(x) <= rows(x)) | (columns(x) < 2),  # a prefix
    lambda m, x: (columns(x) <= rows(x)) & (columns(x) > 0),
    lambda m, x: (columns(x) <= rows(x)) & (rows(x) < 6),  # looks causal up to length 6
    lambda m, x: (columns(x) <= rows(x)) & ((rows(x) - columns(x)) != 8),
    lambda m, x: columns(x) <= rows(x) * 2,
    lambda m, x: columns(x) * rows(x) <= rows(x) * rows(x),
    lambda m, x: m.triangle[: x.shape[1], : x.shape[1]],
    lambda m, x: torch.where(columns(x) <= rows(x), 0.0, -5.0).to(x.dtype),
    lambda m, x: torch.where(columns(x) <= rows(x), 1.0, -math.inf).to(x.dtype),
    lambda m, x: (columns(x) <= rows(x)) & (x.sum(-1)[:, None, None] > -100),
    lambda m, x: (columns(x) <= rows(x)).to(x.dtype),
    lambda m, x: columns(x).bfloat16() <= rows(x).bfloat16(),
]


@pytest.mark.parametrize("mask", NOT_CAUSAL)
def test_what_is_not_causal_stays_a_tensor(mask: Callable[..., Any]) -> None:
    triangle = torch.ones(32, 32, dtype=torch.bool).tril()
    triangle[20, 25] = True  # one entry too many, beyond the example
    case, node = attention_of(mask, triangle=triangle)
    assert node.args[3] is not None
    for length in (2, 9):
        case.assert_same_numbers(draw(1, length, 8, seed=length), exact=False)


def test_fixed_sizes_may_be_smaller_than_the_window() -> None:
    _, node = attention_of(lambda m, x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - 6), dynamic=False)
    assert kind(node) == ("causal", 0, False)
    _, node = attention_of(lambda m, x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - 5), dynamic=False)
    assert kind(node) == ("window", 5, False)


def test_padding_keeps_its_tensor_beside_the_proof() -> None:
    def function(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mask = (columns(x) <= rows(x)) & padding[:, None, None, :]
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)

    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, :3] = False
    case = Case(function, draw(2, 6, 8), padding)
    case.run(*CANONICALIZE, recognize_attention)
    assert kind(case.only(ATTENTION)) == ("causal", 0, True)
    case.assert_same_numbers(exact=False)  # also in rows that see no key


def test_a_finite_hidden_value_and_padding_stay_one_tensor() -> None:
    """A query that sees no key mixes all keys then, also those of the future."""

    def function(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        hidden = -1e30
        causal = torch.where(columns(x) <= rows(x), 0.0, hidden).to(x.dtype)
        padded = torch.where(padding[:, None, None, :], 0.0, hidden).to(x.dtype)
        scores = heads @ heads.mT + causal + padded
        return scores.softmax(-1) @ heads

    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, :3] = False
    case = Case(function, draw(2, 6, 8), padding)
    case.run(*CANONICALIZE, recognize_attention)
    node = case.only(ATTENTION)
    assert kind(node) == ("none", 0, True)
    assert "a query may see no key" in node.meta["mask_proof"]


def test_a_bounded_bias_does_not_stand_in_the_way() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        alibi = m.slopes[:, None, None] * torch.arange(x.shape[1])[None, None, :]
        causal = torch.where(columns(x) <= rows(x), 0.0, -1e30).to(x.dtype)
        return (heads @ heads.mT + alibi[None] + causal).softmax(-1) @ heads

    case = Case(function, draw(2, 6, 8), slopes=torch.tensor([0.5, 0.25], dtype=torch.float64))
    case.run(*CANONICALIZE, recognize_attention)
    assert kind(case.only(ATTENTION)) == ("causal", 0, True)
    case.assert_same_numbers(draw(1, 9, 8), exact=False)


@settings(max_examples=20)
@given(
    low=st.integers(-2, 2),
    high=st.one_of(st.none(), st.integers(-1, 5)),
    flipped=st.booleans(),
    hole=st.one_of(st.none(), st.integers(0, 7)),
    prefix=st.integers(0, 2),
)
def test_random_bands(low: int, high: int | None, flipped: bool, hole: int | None, prefix: int) -> None:
    """low <= d < high, perhaps with a hole at one key position and a prefix that all see: the kind is named exactly
    when it is the kind, and the numbers are right whatever is named."""

    def mask(m: Any, x: Tensor) -> Tensor:
        distance = rows(x) - columns(x)
        visible = distance >= low if not flipped else ~(distance < low)
        if high is not None:
            visible = visible & (columns(x) > rows(x) - high)
        if hole is not None:
            visible = visible & (columns(x) != hole)
        if prefix:
            visible = visible | (columns(x) < prefix)
        return visible

    case, node = attention_of(mask)
    plain = hole is None and prefix == 0 and low == 0
    expected = ("none", 0, True)
    if plain and high is None:
        expected = ("causal", 0, False)
    elif plain and high is not None and high > 0:
        expected = ("window", high, False)
    name, window, tensor = kind(node)
    if tensor:  # a part may be proved beside the tensor
        assert not (plain and (high is None or high > 0))
    else:
        assert (name, window, tensor) == expected
    for length in (3, 9):
        case.assert_same_numbers(draw(1, length, 8, seed=length), exact=False)


def test_more_queries_than_keys_is_proved_by_position() -> None:
    """The last keys belong to the last queries: the offset keys - queries enters the proof."""

    def function(m: Any, q: Tensor, k: Tensor) -> Tensor:
        heads, keys = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k))
        past = k.shape[1] - q.shape[1]
        mask = columns(k) <= rows(q) + past
        return F.scaled_dot_product_attention(heads, keys, keys, attn_mask=mask)

    case = Case(function, draw(2, 3, 8), draw(2, 7, 8))
    case.run(*CANONICALIZE, recognize_attention)
    assert kind(case.only(ATTENTION)) == ("causal", 0, False)
    case.assert_same_numbers(draw(2, 1, 8), draw(2, 5, 8), exact=False)


def test_top_left_alignment_is_not_causal() -> None:
    def function(m: Any, q: Tensor, k: Tensor) -> Tensor:
        heads, keys = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k))
        return F.scaled_dot_product_attention(heads, keys, keys, attn_mask=columns(k) <= rows(q))

    case = Case(function, draw(2, 3, 8), draw(2, 7, 8))
    for pass_ in (*CANONICALIZE, recognize_attention):
        run_pass(case.graph_module, pass_)
    assert kind(case.only(ATTENTION)) == ("none", 0, True)
    case.assert_same_numbers(draw(2, 2, 8), draw(2, 5, 8), exact=False)


def length_as_tensor(x: Tensor) -> Tensor:
    """The length, where torch cannot turn it into a branch of the program."""
    return torch.ones(x.shape[1], dtype=torch.int64).sum()


LOOKS_CAUSAL: dict[str, Callable[[int], Callable[..., Any]]] = {
    "sees key n": lambda n: lambda m, x: (columns(x) <= rows(x)) | (columns(x) == n),
    "query n sees its successor": lambda n: (
        lambda m, x: (columns(x) <= rows(x)) | ((rows(x) == n) & (columns(x) == n + 1))
    ),
    "hides key 0 from n": lambda n: lambda m, x: (columns(x) <= rows(x)) & ((columns(x) > 0) | (rows(x) < n)),
    "a block behind n": lambda n: lambda m, x: (columns(x) <= rows(x)) | ((rows(x) >= n) & (columns(x) >= n)),
    "chunks of n": lambda n: lambda m, x: (columns(x) <= rows(x)) & (rows(x) // n == columns(x) // n),
    "everything from n": lambda n: lambda m, x: (columns(x) <= rows(x)) | (rows(x) >= n),
    "clamped at n": lambda n: lambda m, x: columns(x) <= rows(x).clamp(max=n - 1),
    "even lengths": lambda n: lambda m, x: (columns(x) <= rows(x)) | (length_as_tensor(x) % 2 == 1),
    "lengths up to n": lambda n: lambda m, x: (columns(x) <= rows(x)) | (length_as_tensor(x) > n),
    "a window of the length": lambda n: (
        lambda m, x: (columns(x) <= rows(x)) & (rows(x) - columns(x) < 2 * n - length_as_tensor(x))
    ),
    "a window of n": lambda n: lambda m, x: (columns(x) <= rows(x)) & (rows(x) - columns(x) <= n),
    "the tokens": lambda n: lambda m, x: (columns(x) <= rows(x)) | (x.sum(-1) > 100)[:, None, None, :],
    "the number of tokens": lambda n: lambda m, x: (columns(x) <= rows(x)) & (x.isfinite().sum() < 10 * n**2),
    "a table with a wrong entry": lambda n: lambda m, x: m.table[n][: x.shape[1], : x.shape[1]],
    "steep": lambda n: lambda m, x: columns(x) * n <= rows(x) * n + rows(x),
    "steps": lambda n: lambda m, x: (columns(x) + n) // (n + 1) * 0 + columns(x) <= rows(x) + (rows(x) >= n),
}


@settings(max_examples=16)
@given(
    name=st.sampled_from(sorted(LOOKS_CAUSAL)),
    n=st.integers(6, 9),
    added=st.sampled_from([None, -math.inf, -1e30]),
)
def test_what_looks_causal_in_the_example_is_not_called_causal(
    name: str, n: int, added: float | None
) -> None:
    """Every mask here is the causal triangle at the length of the example, and another one at some length."""
    mask = LOOKS_CAUSAL[name](n)

    def function(m: Any, x: Tensor) -> Tensor:
        visible = mask(m, x)
        return visible if added is None else torch.where(visible, 0.0, added).to(x.dtype)

    table = torch.ones(16, 32, 32, dtype=torch.bool).tril()
    for place in range(15):
        table[place, place, place + 1] = True
    case, node = attention_of(function, table=table)
    proved, window, has_tensor = kind(node)
    assert has_tensor or (name == "a window of n" and (proved, window) == ("window", n + 1))
    for length in (n + 1, 2 * n):
        case.assert_same_numbers(draw(2, length, 8, seed=length), exact=False)


NAMES: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x: columns(x) >= 0, "none"),
    (lambda m, x: columns(x) <= rows(x), "causal"),
    (lambda m, x: (columns(x) <= rows(x)) & (columns(x) > rows(x) - 3), "window 3"),
    (lambda m, x: (columns(x) <= rows(x)) | (columns(x) < m.prefix), "prefix"),
    (lambda m, x: (columns(x) <= rows(x)) & (x.sum(-1) > 0)[:, None, None, :], "causal and padding"),
    (lambda m, x: (x.sum(-1) > 0)[:, None, None, :], "padding"),
    (
        lambda m, x: (
            torch.where(columns(x) <= rows(x), 0.0, -math.inf).to(x.dtype)
            + m.slopes[:, None, None] * columns(x)[None]
        )[None],
        "causal and bias",
    ),
    (lambda m, x: (columns(x) <= rows(x)) | (columns(x) == rows(x) + 2), "tensor"),
]


@pytest.mark.parametrize(("mask", "name"), NAMES)
def test_the_name_of_a_mask(mask: Callable[..., Any], name: str) -> None:
    """What the ledger says; the number of prefix tokens is only known at run time."""
    weights = {"slopes": draw(2, seed=3).abs(), "prefix": torch.tensor([[3]])}
    case, node = attention_of(mask, **weights)
    assert node.meta["mask_name"] == name
    case.assert_same_numbers(draw(2, 9, 8), exact=False)


@pytest.mark.parametrize(
    ("function", "low"),
    [
        (lambda x: torch.ones_like(x).cumsum(-1) - 1, 0.0),
        (lambda x: (torch.ones_like(x).cumsum(-1) - 1) * torch.arange(x.shape[1]), 0.0),
        (lambda x: torch.ones_like(x) - 3, -2.0),
        (lambda x: (torch.ones_like(x) - 3).cumsum(-1), None),
        (lambda x: torch.ones_like(x) - x, None),
        (lambda x: x.cumsum(-1), None),
    ],
)
def test_lower_bounds_hold_for_all_sizes(function: Callable[[Tensor], Tensor], low: float | None) -> None:
    class Bias(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    program = capture(Bias().eval(), (torch.zeros(2, 5, dtype=torch.int64),), verify=False)
    for pass_ in CANONICALIZE:
        run_pass(program.graph_module, pass_)
    assert lower_bound(program.graph_module, program.outputs[0]) == low
