"""recognize_attention: the parts of an attention, and what is none."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE, canonicalize_scores, recognize_attention
from torchweld.passes.match_attention import Attention

ATTENTION = torch.ops.torchweld.attention.default
PASSES = (*CANONICALIZE, recognize_attention)


def qkv(heads: int = 4, key_heads: int = 4, queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(2, heads, queries, 8),
        draw(2, key_heads, keys, 8, seed=1),
        draw(2, key_heads, keys, 6, seed=2),
    )


def recognized(function: Callable[..., Any], *inputs: Tensor, **weights: Tensor) -> Case:
    case = Case(function, *inputs, **weights)
    outcome = case.run(*PASSES)[-1]
    assert (outcome.applied, outcome.refused) == (1, ())
    case.assert_same_numbers(exact=False)
    return case


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.5) -> Tensor:
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (lambda m, q, k, v: naive(q, k, v), 0.5),
        (lambda m, q, k, v: (q @ k.mT / 4.0).softmax(-1) @ v, 0.25),
        (lambda m, q, k, v: (q @ k.mT / math.sqrt(8) * 2).softmax(-1) @ v, 2 / math.sqrt(8)),
        (lambda m, q, k, v: (q @ (k.mT / 4)).softmax(-1) @ v, 0.25),
        (lambda m, q, k, v: (q @ (k.mT / m.four)).softmax(-1) @ v, 0.25),
        (lambda m, q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v, 1.0),  # stays on the query
        (lambda m, q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, m.training) @ v, 1.0),
        (lambda m, q, k, v: (q @ k.mT).float().softmax(-1).to(q.dtype) @ v, 1.0),
        (lambda m, q, k, v: torch.softmax(q @ k.mT, dim=-1, dtype=torch.float64) @ v, 1.0),
        (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), 1 / math.sqrt(8)),
        (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 0.3),
    ],
)
def test_scales(function: Callable[..., Any], scale: float) -> None:
    case = Case(function, *qkv(), four=torch.tensor(4.0, dtype=torch.float64))
    outcome = case.run(*PASSES)[-1]
    assert (outcome.applied, outcome.refused) == (1, ())
    node = case.only(ATTENTION)
    assert node.args[3:6] == (None, "none", 0) and node.args[7] == 0.0
    assert math.isclose(float(node.args[6]), scale)  # type: ignore[arg-type]
    assert case.count(aten.softmax.int) == 0
    torch.testing.assert_close(case.program.run(*case.inputs), case.before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (lambda m, q, k, v: (30.0 * torch.tanh(q @ k.mT * 0.5 / 30.0)).softmax(-1) @ v, 0.5),
        (lambda m, q, k, v: (torch.tanh(q @ k.mT / 60.0) * 30).softmax(-1) @ v, 0.5),
    ],
)
def test_soft_cap(function: Callable[..., Any], scale: float) -> None:
    node = recognized(function, *qkv()).only(ATTENTION)
    assert node.args[7] == 30.0
    assert math.isclose(float(node.args[6]), scale)  # type: ignore[arg-type]


def repeat_by_expand(x: Tensor, groups: int) -> Tensor:
    batch, heads, length, size = x.shape
    return (
        x[:, :, None].expand(batch, heads, groups, length, size).reshape(batch, heads * groups, length, size)
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda m, q, k, v: naive(q, repeat_by_expand(k, 2), repeat_by_expand(v, 2)),
        lambda m, q, k, v: naive(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, dim=1)),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, repeat_by_expand(k, 2), repeat_by_expand(v, 2)),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    ],
)
def test_repeated_keys_and_values_are_grouped_heads(function: Callable[..., Any]) -> None:
    case = recognized(function, *qkv(4, 2))
    node = case.only(ATTENTION)
    assert [part.meta["val"].shape[1] for part in node.args[1:3]] == [2, 2]  # type: ignore[union-attr]
    run_pass(case.graph_module, RECOGNIZE[-1])
    assert not {aten.expand.default, aten.repeat_interleave.self_int} & {
        target.target for target in case.graph_module.graph.nodes
    }


def test_tiled_heads_are_not_grouped_heads() -> None:
    """repeat puts head h at h % n, grouping at h // n."""
    case = recognized(lambda m, q, k, v: naive(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), *qkv(4, 2))
    assert case.count(aten.repeat.default) == 2


def test_one_key_head_serves_all() -> None:
    node = recognized(lambda m, q, k, v: naive(q, k, v), *qkv(4, 1)).only(ATTENTION)
    assert node.args[1].meta["val"].shape[1] == 1  # type: ignore[union-attr]


def test_merged_batch_and_heads_are_split_again() -> None:
    """Bloom: baddbmm on [batch * heads, ..] with a bias of one row per head, softmax on four axes."""

    def function(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, _ = q.shape
        merged = [part.reshape(batch * heads, length, part.shape[-1]) for part in (q, k, v)]
        bias = m.bias.repeat(batch, 1, 1)
        scores = bias.baddbmm(merged[0], merged[1].transpose(1, 2), alpha=0.5).view(
            batch, heads, length, length
        )
        return torch.bmm(scores.softmax(-1).view(batch * heads, length, length), merged[2])

    case = recognized(function, *qkv(), bias=draw(4, 1, 1, seed=9))
    node = case.only(ATTENTION)
    assert node.args[:1] == case.program.placeholders[:1]
    assert node.args[6] == 0.5 and node.args[3].meta["val"].dim() == 4  # type: ignore[union-attr]


def test_three_axes_are_one_head() -> None:
    case = recognized(lambda m, q, k, v: naive(q, k, v), *(part[:, 0] for part in qkv()))
    assert case.only(ATTENTION).meta["val"].dim() == 4


def test_masks_of_both_kinds_are_joined() -> None:
    def function(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.5 + bias).masked_fill(~keep[:, None, None, :], -math.inf)
        return scores.softmax(-1) @ v

    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, :2] = False
    case = recognized(function, *qkv(), keep, draw(2, 4, 5, 5, seed=4))
    mask = case.only(ATTENTION).args[3]
    assert isinstance(mask, torch.fx.Node) and mask.target is aten.where.ScalarOther


def test_a_finite_hidden_number_mixes_all_keys_of_an_empty_row() -> None:
    def function(m: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep[:, None, None, :], -1e30).softmax(-1) @ v

    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0] = False
    recognized(function, *qkv(), keep)  # compares the numbers of the empty rows too


CLAUSES: list[tuple[Callable[..., Any], str]] = [
    (lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v[:, :, :5], "the softmax is not over the keys"),
    (
        lambda m, q, k, v: (lambda p: (p @ v, p.sum()))((q @ k.mT).softmax(-1)),
        "the attention weights are used elsewhere",
    ),
    (lambda m, q, k, v: (lambda s: (s.softmax(-1) @ v, s.sum()))(q @ k.mT), "the scores are used elsewhere"),
    (
        lambda m, q, k, v: (lambda s: ((s * 2).softmax(-1) @ v, (s * 2).sum()))(q @ k.mT),
        "the scores are used elsewhere",
    ),
    (
        lambda m, q, k, v: (q @ k.mT).relu().softmax(-1) @ v,
        "aten.relu.default stands between the scores and the softmax",
    ),
    (
        lambda m, q, k, v: ((q @ k.mT + m.bias) * -0.5).softmax(-1) @ v,
        "a mask stands before the scale or the soft cap",
    ),
    (
        lambda m, q, k, v: (30 * torch.tanh(q @ k.mT + m.bias)).softmax(-1) @ v,
        "a mask stands before the scale or the soft cap",
    ),
    (
        lambda m, q, k, v: (2 * (30 * torch.tanh(q @ k.mT)).neg()).softmax(-1) @ v,
        "aten.neg.default stands between the scores and the softmax",
    ),
    (lambda m, q, k, v: (30 * torch.tanh(q @ k.mT) / 2.5).softmax(-1) @ v, "a soft cap is scaled once more"),
    (lambda m, q, k, v: (q[:, :1] @ k[:, :1].mT + m.heads).softmax(-1) @ v, "a mask widens the scores"),
    (
        lambda m, q, k, v: (q @ k.mT).masked_fill(m.bias > 0, -5.0).softmax(-1) @ v,
        "aten.where.ScalarSelf stands between the scores and the softmax, and is no mask",
    ),
    (lambda m, q, k, v: (q[:1] @ k.mT).softmax(-1) @ v, "batch sizes of query, key and value differ"),
    (lambda m, q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v, "key and value have different numbers of heads"),
    (
        lambda m, q, k, v: (q @ k.mT).flatten(-2).softmax(-1).unflatten(-1, (5, 5)) @ v,
        "the attention weights are reshaped beyond batch and heads",
    ),
    (
        lambda m, q, k, v: ((q @ k.mT).reshape(2, 20, 5) * 2).reshape(2, 4, 5, 5).softmax(-1) @ v,
        "the scores are reshaped beyond batch and heads",
    ),
    (
        lambda m, q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]),
        "query, key and value do not have the axes [batch, heads, positions, features]",
    ),
    (
        lambda m, q, k, v: F.scaled_dot_product_attention(q[:1, 0], k[:, 0], v[:, 0]),
        "batch sizes of query, key and value differ",
    ),
    (
        lambda m, q, k, v: F.scaled_dot_product_attention(q[:1], k, v),
        "batch sizes of query, key and value differ",
    ),
]


@pytest.mark.parametrize(("function", "reason"), CLAUSES)
def test_refuses(function: Callable[..., Any], reason: str) -> None:
    case = Case(function, *qkv(), dynamic=False, bias=draw(5, 5, seed=3), heads=draw(1, 4, 5, 5, seed=4))
    outcome = case.run(*PASSES)[-1]
    assert outcome.applied == 0 and len(outcome.refused) == 1
    assert reason in reasons(outcome)[0]
    assert outcome.refused[0].node is not None
    case.assert_same_numbers(exact=False)


def test_refuses_a_mask_without_batch_where_scores_are_not_canonical() -> None:
    function = lambda m, q, k, v: (q @ k.mT + m.heads).softmax(-1) @ v  # noqa: E731
    case = Case(function, *qkv(), dynamic=False, heads=draw(4, 5, 5, seed=4))
    passes = [pass_ for pass_ in PASSES if pass_ is not canonicalize_scores]
    assert reasons(case.run(*passes)[-1]) == ["a mask has heads but no batch"]


def test_refuses_training_dropout() -> None:
    case = Case(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv())
    node = case.only(aten.scaled_dot_product_attention.default)
    node.args = (*node.args[:3], None, 0.5)
    assert reasons(run_pass(case.graph_module, recognize_attention)) == ["dropout is training"]


def test_refuses_features_that_are_not_fixed_only_without_a_scale() -> None:
    def function(m: Any, x: Tensor, scale: float | None) -> Tensor:
        heads = x[:, None].transpose(-1, -2)  # [batch, 1, features, length]
        return F.scaled_dot_product_attention(heads, heads, heads, scale=scale)

    case = Case(lambda m, x: function(m, x, None), draw(2, 5, 4))
    assert reasons(case.run(*PASSES)[-1]) == ["the number of features is not fixed"]
    assert Case(lambda m, x: function(m, x, 0.5), draw(2, 5, 4)).run(*PASSES)[-1].applied == 1


def test_refuses_values_of_another_dtype() -> None:
    case = Case(lambda m, q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv())
    product = [node for node in case.graph_module.graph.nodes if node.target is aten.matmul.default][-1]
    product.meta["val"] = product.meta["val"].float()
    assert reasons(run_pass(case.graph_module, recognize_attention)) == [
        "the result has another dtype than the values"
    ]


def test_refuses_sizes_that_no_node_gives() -> None:
    """The rewrite would have to write them into a reshape: two sizes that stand in no input cannot be written."""
    case = Case(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv())
    (site,) = recognize_attention.find(case.graph_module)
    assert isinstance(site.found, Attention) and recognize_attention.check(case.graph_module, site) is None
    foreign = (sympy.Symbol("u7"), 4, sympy.Symbol("u8"), 5)
    lost = replace(site, found=replace(site.found, shape=foreign))
    refusal = recognize_attention.check(case.graph_module, lost)
    assert refusal is not None and "cannot be read from any node" in refusal.reason


def test_is_causal_is_causal() -> None:
    case = Case(lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), draw(2, 3, 5, 8))
    case.run(*PASSES)
    assert case.only(ATTENTION).args[3:6] == (None, "causal", 0)
    case.assert_same_numbers(exact=False)
