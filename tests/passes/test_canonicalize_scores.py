"""canonicalize_scores: softmax by its name, the scale below the masks; what is not a softmax stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.passes.support import Case, aten, draw, reasons
from torchweld.passes import canonicalize_arithmetic, canonicalize_scores, canonicalize_views

PREPARE = (canonicalize_views, canonicalize_arithmetic, canonicalize_scores)


def exponentials(x: Any) -> Any:
    return torch.exp(x - x.amax(-1, keepdim=True))


def run(function: Any, **weights: Any) -> tuple[Case, Any]:
    inputs = draw(2, 3, 5, 4), draw(2, 3, 5, 4, seed=1)
    case = Case(lambda m, q, k: function(m, q @ k.transpose(-1, -2), k), *inputs, **weights)
    return case, case.run(*PREPARE)[-1]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, s, v: (s - s.amax(-1, keepdim=True)).softmax(-1),
        lambda m, s, v: (s - s.max(-1, keepdim=True)[0]).softmax(-1),
        lambda m, s, v: (lambda e: e / e.sum(-1, keepdim=True))(exponentials(s)),
        lambda m, s, v: (lambda e: e / e.sum(3, True))(exponentials(s)),
        lambda m, s, v: (lambda e: e @ v / e.sum(-1, keepdim=True))(exponentials(s)),
    ],
)
def test_softmax_by_its_name(function: Any) -> None:
    case, outcome = run(function)
    assert (outcome.applied, outcome.refused) == (1, ())
    assert case.count(aten.softmax.int) == 1
    assert not case.count(aten.exp.default) + case.count(aten.sub.Tensor) + case.count(aten.div.Tensor)
    case.assert_same_numbers(exact=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, s, v: ((s + m.bias) * 0.5).softmax(-1),
        lambda m, s, v: ((m.bias + s) / m.two).softmax(-1),
        lambda m, s, v: (s.masked_fill(m.bias > 0, -math.inf) * m.two).softmax(-1),
        lambda m, s, v: (s.masked_fill(m.bias > 0, torch.finfo(s.dtype).min) * 2).softmax(-1),
        lambda m, s, v: (0.25 * torch.where(m.bias > 0, s, -1e30)).softmax(-1),
    ],
)
def test_the_scale_goes_below_the_mask(function: Any) -> None:
    case, outcome = run(function, bias=draw(5, 5, seed=3), two=torch.tensor(2.0, dtype=torch.float64))
    assert (outcome.applied, outcome.refused) == (1, ())
    softmax = case.only(aten.softmax.int)
    assert isinstance(softmax.args[0], torch.fx.Node)
    assert softmax.args[0].target in (aten.add.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf)
    case.assert_same_numbers(exact=False)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda m, s, v: (lambda e: e / e.sum(-1, keepdim=True))(s.exp()),
            "exponentials without their maximum taken off",
        ),
        (
            lambda m, s, v: (lambda e: (e / e.sum(-1, keepdim=True), e.mean()))(exponentials(s)),
            "the exponentials are used elsewhere",
        ),
        (
            lambda m, s, v: (lambda e, t: (e @ v / t, (e @ v).sum()))(exponentials(s), 1),
            None,
        ),
        (
            lambda m, s, v: (lambda e: (lambda y: (y / e.sum(-1, keepdim=True), y.mean()))(e @ v))(
                exponentials(s)
            ),
            "the values mixed without the division are used elsewhere",
        ),
        (
            lambda m, s, v: ((s + m.bias) * -0.5).softmax(-1),
            "a mask is scaled by a number that is not positive",
        ),
        (
            lambda m, s, v: (lambda y: ((y * 0.5).softmax(-1), y.mean()))(s + m.bias),
            "the masked scores are used elsewhere",
        ),
        (lambda m, s, v: (s + m.bias) * 0.5, None),  # leads to no softmax
        (lambda m, s, v: torch.max(s + m.bias, m.lowest).softmax(-1), None),  # the mask may hold -inf
        (lambda m, s, v: torch.max(s + torch.where(m.bias > 0, m.bias, -1e30), m.lowest).softmax(-1), None),
        (lambda m, s, v: (v + m.row) * 0.5, None),  # comes from no product
        (lambda m, s, v: (s - s.amax(-2, keepdim=True)).softmax(-1), None),
        (lambda m, s, v: (s - s.amax(-1, keepdim=True)).softmax(-2), None),
        (lambda m, s, v: (lambda e: e / e.sum(-2, keepdim=True))(exponentials(s)), None),
        (lambda m, s, v: (lambda e: e / e.sum((-1, -2), keepdim=True))(exponentials(s)), None),
    ],
)
def test_refuses(function: Any, reason: str | None) -> None:
    lowest = torch.tensor(torch.finfo(torch.float64).min, dtype=torch.float64)
    case, outcome = run(function, bias=draw(5, 5, seed=3), row=draw(4, seed=4), lowest=lowest)
    assert outcome.applied == 0
    assert [reason in given for given in reasons(outcome)] == ([] if reason is None else [True])
    case.assert_same_numbers(exact=False)
