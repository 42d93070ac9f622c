"""recognize_rms_norm and recognize_layer_norm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, recognize_layer_norm, recognize_rms_norm

RMS = (*CANONICALIZE, recognize_rms_norm)
LAYER = (*CANONICALIZE, recognize_layer_norm)
W, B = draw(8, seed=5), draw(8, seed=6)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.w * rms(x),
        lambda m, x: rms(x) * m.w,
        lambda m, x: (1.0 + (m.w - 1)) * rms(x),  # Gemma stores w - 1
        lambda m, x: m.w * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda m, x: m.w * (x * (x.square().mean(dim=2, keepdim=True) + 1e-6) ** -0.5),
        lambda m, x: (torch.rsqrt(1e-6 + (x * x).mean(-1, keepdim=True)) * x) * m.w,
    ],
)
def test_rms_norm(function: Callable[..., Any]) -> None:
    case = Case(function, draw(2, 5, 8), w=W)
    outcome = case.run(*RMS)[-1]
    assert outcome.applied == 2 and not outcome.refused
    assert [target for target in case.node_targets() if "sym_size" not in target] == ["aten.rms_norm.default"]
    norm = case.only(aten.rms_norm.default)
    assert norm.args[1] == [8] and norm.args[3] == 1e-6
    case.assert_same_numbers(exact=False)
    torch.testing.assert_close(case.program.run(draw(1, 1, 8)), F.rms_norm(draw(1, 1, 8), [8], W, 1e-6))


def test_half_precision_keeps_its_casts() -> None:
    def llama(m: Any, x: Tensor) -> Tensor:
        return m.w * rms(x.float()).to(x.dtype)

    case = Case(llama, draw(2, 5, 8, dtype=torch.bfloat16), w=W.bfloat16())
    case.run(*RMS)
    assert case.count(aten.rms_norm.default) == 1 and case.count(aten._to_copy.default) == 2
    torch.testing.assert_close(case.program.run(*case.inputs), case.before, rtol=1e-2, atol=1e-2)


def test_t5_scales_the_half_precision_tensor() -> None:
    def t5(m: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)

    case = Case(t5, draw(2, 5, 8, dtype=torch.bfloat16))
    case.run(*RMS)
    assert case.count(aten.rms_norm.default) == 1
    torch.testing.assert_close(case.program.run(*case.inputs), case.before)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
            "the mean is not over exactly the last axis, kept",
        ),
        (
            lambda m, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6),
            "the mean is not over exactly the last axis, kept",
        ),
        (
            lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.sum()),
            "what is added to the mean is not a constant number",
        ),
        (
            lambda m, x: x.relu() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            "the mean is of the square of another tensor than the one that is scaled",
        ),
        (
            lambda m, x: F.rms_norm(x, [8]) * m.column,
            "the weight is not one number per feature in the dtype of the norm",
        ),
        (
            lambda m, x: F.rms_norm(x.float(), [8]) * m.w,
            "the weight is not one number per feature in the dtype of the norm",
        ),
    ],
)
def test_rms_norm_refuses(function: Callable[..., Any], reason: str) -> None:
    case = Case(function, draw(2, 8, 8), w=W, column=draw(8, 1))
    outcome = case.run(*RMS)[-1]
    assert reasons(outcome) == [reason]
    case.assert_same_numbers(exact=False)


def test_rms_norm_refuses_features_that_are_not_fixed() -> None:
    case = Case(lambda m, x: rms(x.transpose(1, 2)), draw(2, 5, 8))
    outcome = case.run(*RMS)[-1]
    assert reasons(outcome) == ["the number of features is not fixed"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.w * (centre(x) * torch.rsqrt(centre(x).pow(2).mean(-1, keepdim=True) + 1e-5)) + m.b,
        lambda m, x: m.b + (centre(x) / torch.sqrt((centre(x) ** 2).mean(-1, keepdim=True) + 1e-5)) * m.w,
        lambda m, x: F.layer_norm(x, [8], None, None, 1e-5) * m.w + m.b,
        lambda m, x: F.layer_norm(x, [8], m.w, None, 1e-5) + m.b,
    ],
)
def test_layer_norm(function: Callable[..., Any]) -> None:
    case = Case(function, draw(2, 5, 8), w=W, b=B)
    outcome = case.run(*LAYER)[-1]
    assert not outcome.refused
    assert [target for target in case.node_targets() if "sym_size" not in target] == [
        "aten.layer_norm.default"
    ]
    case.assert_same_numbers(exact=False)
    torch.testing.assert_close(case.program.run(draw(1, 1, 8)), F.layer_norm(draw(1, 1, 8), [8], W, B, 1e-5))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda m, x: centre(x) * torch.rsqrt(centre(x).pow(2).mean(1, keepdim=True) + 1e-5),
            "the mean is not over exactly the last axis, kept",
        ),
        (
            lambda m, x: centre(x) * torch.rsqrt(centre(x).pow(2).mean(-1, keepdim=True) + x.sum()),
            "what is added to the mean is not a constant number",
        ),
        (
            lambda m, x: centre(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
            "the variance is of another tensor than the one that is scaled",
        ),
        (
            lambda m, x: (lambda d: d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5))(
                x - x.mean(1, keepdim=True)
            ),
            "the mean that is subtracted is not over exactly the last axis, kept",
        ),
        (
            lambda m, x: F.layer_norm(x, [8]) * m.column,
            "the vector is not one number per feature in the dtype of the norm",
        ),
    ],
)
def test_layer_norm_refuses(function: Callable[..., Any], reason: str) -> None:
    case = Case(function, draw(2, 8, 8), w=W, column=draw(8, 1))
    outcome = case.run(*LAYER)[-1]
    assert reasons(outcome) == [reason]
    case.assert_same_numbers(exact=False)


def test_a_bias_before_the_weight_is_no_affine() -> None:
    case = Case(lambda m, x: (F.layer_norm(x, [8]) + m.b) * m.w, draw(2, 5, 8), w=W, b=B)
    case.run(*LAYER)
    assert case.count(aten.mul.Tensor) == 1  # the weight would scale the bias too
    case.assert_same_numbers(exact=False)


def test_standard_deviation_is_not_layer_norm() -> None:
    case = Case(lambda m, x: centre(x) / (x.std(-1, keepdim=True) + 1e-5), draw(2, 5, 8))
    assert run_pass(case.graph_module, recognize_layer_norm).matched == 0
