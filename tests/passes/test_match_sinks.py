"""What only looks like attention sinks is refused by name; what is taken for them is in test_attention_spellings.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.support import Case, draw
from torchweld.passes import CANONICALIZE, recognize_attention

ATTENTION = torch.ops.torchweld.attention.default
HEADS, SIZE, LENGTH, BATCH = 4, 8, 5, 2
Function = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


def spread(m: Any, q: Tensor) -> Tensor:
    """The sinks as scores [batch, heads, queries, 1]."""
    sinks: Tensor = m.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return sinks


def plain(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores_of(q, k), spread(m, q)], -1).softmax(-1)[..., :-1] @ v


def of_every_query(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores_of(q, k), q.sum(-1, keepdim=True)], -1).softmax(-1)[..., :-1] @ v


def one_for_all_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sink = m.sinks[:1].view(1, 1, 1, 1).expand(*q.shape[:-1], 1)
    return torch.cat([scores_of(q, k), sink], -1).softmax(-1)[..., :-1] @ v


def merged_heads(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One axis of batch and heads: nothing says which head a sink belongs to."""
    sink = spread(m, q).flatten(0, 1)
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    return torch.cat([scores_of(q, k), sink], -1).softmax(-1)[..., :-1] @ v


def wrong_side(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first key is cut off, not the sink; every weight goes to the wrong value."""
    return torch.cat([scores_of(q, k), spread(m, q)], -1).softmax(-1)[..., 1:] @ v


def without_sinks(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1)[..., :-1] @ v[:, :, :-1]


def queries_cut(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1)[..., :-1, :] @ v


def not_cut(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sink has a value of its own."""
    both = torch.cat([v, torch.ones_like(v[:, :, :1])], 2)
    return torch.cat([scores_of(q, k), spread(m, q)], -1).softmax(-1) @ both


def cut_twice(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.cat([scores_of(q, k), spread(m, q)], -1).softmax(-1)[..., :-1]
    return weights.to(torch.float32)[..., 1:].to(torch.float64) @ v[:, :, 1:]


def scaled(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.cat([q @ k.mT, spread(m, q)], -1) * 0.5).softmax(-1)[..., :-1] @ v


def masked(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some queries do not see the sink."""
    hidden = torch.arange(q.shape[2])[:, None] > torch.arange(k.shape[2] + 1)[None, :]
    scores = torch.cat([scores_of(q, k), spread(m, q)], -1).masked_fill(hidden, -math.inf)
    return scores.softmax(-1)[..., :-1] @ v


def two_sinks(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([scores_of(q, k), spread(m, q), spread(m, q)], -1).softmax(-1)[..., :-2] @ v


def one_behind_the_other(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([torch.cat([scores_of(q, k), spread(m, q)], -1).to(torch.float64), spread(m, q)], -1)
    return scores.softmax(-1)[..., :-1] @ torch.cat([v, v[:, :, :1]], 2)


def more_scores(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of other keys are no sinks."""
    return torch.cat([scores_of(q, k), scores_of(q, v)], -1).softmax(-1) @ torch.cat([v, k], 2)


NO_SINK = "the scores are concatenated with something that is no sink"
NOT_ONE = "the sinks are not one number per query head"
OTHER_CUT = "a part of the weights is cut off that is no sink"
BEFORE = "a sink stands before the scale, the soft cap, a mask or another sink"
REFUSED: dict[str, tuple[Function, str]] = {
    "of every query": (of_every_query, NOT_ONE),
    "one for all heads": (one_for_all_heads, NOT_ONE),
    "merged heads": (merged_heads, NOT_ONE),
    "the wrong weight cut off": (wrong_side, OTHER_CUT),
    "weights cut without a sink": (without_sinks, OTHER_CUT),
    "queries cut": (queries_cut, OTHER_CUT),
    "not cut off": (not_cut, "the weight of the sink is not cut off"),
    "cut twice": (cut_twice, "the attention weights are cut twice"),
    "scaled": (scaled, BEFORE),
    "masked": (masked, BEFORE),
    "two sinks": (two_sinks, NO_SINK),
    "one behind the other": (one_behind_the_other, BEFORE),
    "more scores": (more_scores, NO_SINK),
}


def case_of(function: Function) -> Case:
    q, k = draw(BATCH, HEADS, LENGTH, SIZE), draw(BATCH, HEADS, LENGTH, SIZE, seed=1)
    dynamic = {f"inputs_{number}": (0, 2) for number in range(3)}
    return Case(
        function, q, k, draw(BATCH, HEADS, LENGTH, SIZE, seed=2), dynamic=dynamic, sinks=draw(HEADS, seed=3)
    )  # type: ignore[arg-type]


def test_the_plain_spelling_fires() -> None:
    case = case_of(plain)
    (outcome,) = case.run(*CANONICALIZE, recognize_attention)[-1:]
    assert outcome.applied == 1 and len(case.only(ATTENTION).args) == 9
    case.assert_same_numbers(exact=False)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    function, reason = REFUSED[name]
    case = case_of(function)
    (outcome,) = case.run(*CANONICALIZE, recognize_attention)[-1:]
    assert outcome.applied == 0 and [refusal.reason for refusal in outcome.refused] == [reason]
    case.assert_same_numbers(exact=False)
