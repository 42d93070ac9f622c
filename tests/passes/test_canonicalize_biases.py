"""canonicalize_biases: fires on tables that are cut at the front, refuses clause by clause, keeps the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.support import Case, draw
from torchweld.graph.match import aten
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, canonicalize_biases, recognize_attention

HEADS, LONGEST = 2, 32
ATTENTION = canonicalize_biases.ATTENTION
SLOPES = torch.tensor([0.37, 0.021], dtype=torch.float64)[:, None]
LINE = SLOPES * torch.arange(1 - LONGEST, 1)


Cut = Callable[[Any, Tensor], Tensor]


def attention_of(cut: Cut, table: Tensor = LINE, layers: int = 1) -> Case:
    """Causal attention with the bias cut(m, x) [.., S], of which m.table is [heads, LONGEST]."""

    def layer(m: Any, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, 4)).transpose(1, 2)
        scores = heads @ heads.transpose(2, 3) * 0.5 + cut(m, x)
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mixed = scores.masked_fill(~earlier, float("-inf")).softmax(-1) @ heads
        return mixed.transpose(1, 2).flatten(2)

    def function(m: Any, x: Tensor) -> Tensor:
        for _ in range(layers):
            x = layer(m, x)
        return x

    case = Case(function, draw(2, 6, 8), table=table)
    case.run(*CANONICALIZE, recognize_attention)
    return case


def from_the_end(m: Any, x: Tensor) -> Tensor:
    return m.table[:, None, -x.shape[1] :]  # type: ignore[no-any-return]


def by_maximum(m: Any, x: Tensor) -> Tensor:
    start = torch.sym_max(LONGEST - x.shape[1], 0)
    return m.table[None, :, None, start:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("cut", [from_the_end, by_maximum])
@pytest.mark.parametrize("table", [LINE, LINE[:1]])
def test_counts_from_the_first_key(cut: Cut, table: Tensor) -> None:
    case = attention_of(cut, table)
    outcome = run_pass(case.graph_module, canonicalize_biases)
    assert (outcome.applied, outcome.refused) == (1, ())
    mask = case.only(ATTENTION).args[3]
    assert isinstance(mask, torch.fx.Node) and mask.target is aten.slice.Tensor and mask.args[1:3] == (3, 0)
    assert run_pass(case.graph_module, canonicalize_biases).matched == 0, "idempotent"
    case.assert_same_numbers(exact=False)
    case.assert_same_numbers(draw(3, 11, 8, seed=1), exact=False)


def test_layers_share_one_line() -> None:
    case = attention_of(from_the_end, layers=3)
    assert run_pass(case.graph_module, canonicalize_biases).applied == 3
    lines = [
        node for node in case.graph_module.graph.find_nodes(op="get_attr") if "_line" in str(node.target)
    ]
    assert len(lines) == 1
    case.assert_same_numbers(exact=False)


BENT = LINE**2 / LONGEST


def test_what_is_no_line_is_refused() -> None:
    outcome = run_pass(attention_of(from_the_end, BENT).graph_module, canonicalize_biases)
    assert [refusal.reason for refusal in outcome.refused] == ["the bias is no line over the keys"]


def test_sinks_and_other_axes_are_refused() -> None:
    case = attention_of(from_the_end)
    (site,) = canonicalize_biases.find(case.graph_module)
    assert canonicalize_biases.check(case.graph_module, site) is None
    other = replace(site, table=torch.cat([LINE, LINE]))
    refusal = canonicalize_biases.check(case.graph_module, other)
    assert refusal is not None and refusal.reason == "the bias differs between queries or sequences"
    site.anchor.args = (*site.anchor.args[:8], site.source)
    refusal = canonicalize_biases.check(case.graph_module, site)
    assert refusal is not None and refusal.reason == "there are sinks, which have no bias"


@pytest.mark.parametrize(
    "cut",
    [
        lambda m, x: m.table[:, None, : x.shape[1]],
        lambda m, x: m.table[:, None, 3 : 3 + x.shape[1]],
        lambda m, x: m.table[:, None, -x.shape[1] :] * x.mean(),
    ],
)
def test_other_biases_are_not_matched(cut: Cut) -> None:
    assert run_pass(attention_of(cut).graph_module, canonicalize_biases).matched == 0
