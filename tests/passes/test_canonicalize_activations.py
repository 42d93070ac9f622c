"""canonicalize_activations: silu, gelu and relu by their names."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from tests.passes.support import Case, aten, draw, reasons
from torchweld.passes import canonicalize_activations, canonicalize_arithmetic, fold_constants

PREPARE = (fold_constants, canonicalize_arithmetic, canonicalize_activations)
ROOT = math.sqrt(2 / math.pi)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**3))),
        lambda m, x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        lambda m, x: (1 + torch.tanh((x + x * x * x * 0.044715) * ROOT)) * (x / 2),
        lambda m, x: ACT2FN["gelu_new"](x),
        lambda m, x: ACT2FN["gelu_fast"](x),
    ],
)
def test_tanh_gelu(function: Callable[..., Any]) -> None:
    case = Case(function, draw(3, 5))
    outcomes = case.run(*PREPARE)
    assert outcomes[-1].applied == 1
    assert case.node_targets() == ["aten.gelu.default"]
    assert case.only(aten.gelu.default).kwargs == {"approximate": "tanh"}
    torch.testing.assert_close(case.program.run(*case.inputs), case.before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda m, x: x * 0.5 * (torch.erf(x * 0.70710678) + 1.0),
        lambda m, x: (torch.erf(x / 1.4142135) + 1) * x / 2,
    ],
)
def test_erf_gelu(function: Callable[..., Any]) -> None:
    case = Case(function, draw(3, 5))
    case.run(*PREPARE)
    assert case.node_targets() == ["aten.gelu.default"]
    torch.testing.assert_close(case.program.run(*case.inputs), case.before, rtol=1e-6, atol=1e-7)


def test_silu_and_relu() -> None:
    case = Case(lambda m, x: (x * x.sigmoid(), x.sigmoid() * x, x.clamp_min(0), x.clamp(min=0)), draw(3, 5))
    case.run(*PREPARE)
    assert sorted(set(case.node_targets())) == ["aten.relu.default", "aten.silu.default"]
    case.assert_same_numbers(exact=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: x * y.sigmoid(),  # a gate, no activation
        lambda m, x, y: x * (1.702 * x).sigmoid(),
        lambda m, x, y: x.clamp(0, 6),
        lambda m, x, y: x.clamp_min(1),
        lambda m, x, y: 0.4 * x * (1 + torch.erf(x / math.sqrt(2))),
    ],
)
def test_keeps_what_is_something_else(function: Callable[..., Any]) -> None:
    case = Case(function, draw(3, 5), draw(3, 5, seed=1))
    outcomes = case.run(*PREPARE)
    assert outcomes[-1].applied == 0
    case.assert_same_numbers()


def test_refuses_the_polynomial_of_another_tensor() -> None:
    case = Case(lambda m, x, y: 0.5 * x * (1 + torch.erf(y / math.sqrt(2))), draw(3, 5), draw(3, 5, seed=1))
    outcome = case.run(*PREPARE)[-1]
    assert len(outcome.refused) == 1 and "is no polynomial of the factor" in reasons(outcome)[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: 0.5 * x * (1 + torch.erf(x / 1.4)),
        lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.04 * x**3))),
        lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
    ],
)
def test_refuses_other_constants(function: Callable[..., Any]) -> None:
    case = Case(function, draw(3, 5))
    outcome = case.run(*PREPARE)[-1]
    assert len(outcome.refused) == 1 and "are not those of GELU" in reasons(outcome)[0]
    case.assert_same_numbers()
