"""canonicalize_linear: products with constant matrices."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.program import get_tensor
from torchweld.graph.rewrite import run_pass
from torchweld.passes import (
    canonicalize_identities,
    canonicalize_linear,
    canonicalize_views,
    fold_constants,
)

W, B = draw(6, 4, seed=7), draw(6, seed=8)  # [out, in]
PASSES = (
    canonicalize_views,
    canonicalize_identities,
    canonicalize_linear,
    canonicalize_views,
    fold_constants,
)


def conv1d(m: Any, x: Tensor) -> Tensor:
    """GPT-2's, with the weight stored [in, out]."""
    return torch.addmm(m.b, x.view(-1, x.shape[-1]), m.w).view(*x.shape[:-1], 6)


@pytest.mark.parametrize(
    ("function", "weight", "bias"),
    [
        (lambda m, x: x @ m.w.t(), W, None),
        (lambda m, x: x @ m.w, W.t().contiguous(), None),
        (lambda m, x: torch.matmul(x, m.w.transpose(0, 1)) + m.b, W, B),
        (lambda m, x: m.b + F.linear(x, m.w), W, B),
        (lambda m, x: F.linear(x, m.w, m.b), W, B),
        (conv1d, W.t().contiguous(), B),
        (lambda m, x: F.linear(x.flatten(0, 1), m.w).unflatten(0, x.shape[:2]), W, None),
    ],
)
def test_is_one_linear(function: Callable[..., Any], weight: Tensor, bias: Tensor | None) -> None:
    case = Case(function, draw(3, 5, 4), w=weight, **({} if bias is None else {"b": bias}))
    case.run(*PASSES)
    linear = case.only(aten.linear.default)
    assert {target for target in case.node_targets() if "sym_size" not in target} == {"aten.linear.default"}
    stored = get_tensor(case.graph_module, str(linear.args[1].target))  # type: ignore[union-attr]
    assert torch.equal(stored, W)
    assert len(linear.args) == (2 if bias is None else 3)
    case.assert_same_numbers(exact=False)
    case.assert_same_numbers(draw(1, 1, 4, seed=3), exact=False)


def test_a_transposed_weight_shares_its_memory() -> None:
    case = Case(lambda m, x: x @ m.w, draw(3, 5, 4), w=W.t().contiguous())
    case.run(*PASSES)
    linear = case.only(aten.linear.default)
    stored = get_tensor(case.graph_module, str(linear.args[1].target))  # type: ignore[union-attr]
    assert stored.data_ptr() == get_tensor(case.graph_module, "w").data_ptr()


def test_heads_stay_split_behind_the_linear() -> None:
    case = Case(lambda m, x: F.linear(x.flatten(0, 1), m.w).view(*x.shape[:2], 2, 3), draw(3, 5, 4), w=W)
    case.run(*PASSES)
    assert case.count(aten.reshape.default) == 1 and case.count(aten.linear.default) == 1
    case.assert_same_numbers(draw(2, 7, 4), exact=False)


def test_refuses_a_matrix_that_is_computed() -> None:
    case = Case(lambda m, x, y: x @ (y * 2), draw(3, 5, 4), draw(4, 6))
    outcome = case.run(canonicalize_views, canonicalize_linear)[-1]
    assert reasons(outcome) == ["the right operand is not a constant matrix"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), "addmm has a beta or an alpha"),
        (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), "addmm has a beta or an alpha"),
        (lambda m, x: torch.addmm(m.b, x, x.t() @ x @ m.w), "the right operand is not a constant matrix"),
        (
            lambda m, x: torch.addmm(m.wide, x, m.w),
            "the added term is not a constant vector of the output features",
        ),
    ],
)
def test_refuses_addmm(function: Callable[..., Any], reason: str) -> None:
    case = Case(function, draw(5, 4), w=W.t().contiguous(), b=B, wide=draw(1, 6))
    outcome = case.run(canonicalize_views, canonicalize_linear)[-1]
    assert reason in reasons(outcome)
    assert case.count(aten.addmm.default) == 1
    case.assert_same_numbers(exact=False)


def test_refuses_a_second_bias() -> None:
    case = Case(lambda m, x: F.linear(x, m.w, m.b) + m.b, draw(3, 5, 4), w=W, b=B)
    (outcome,) = case.run(canonicalize_linear)
    assert reasons(outcome) == ["the linear has a bias already"]


def test_refuses_when_the_linear_without_bias_is_needed() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = F.linear(x, m.w)
        return (y + m.b) * y

    case = Case(function, draw(3, 5, 4), w=W, b=B)
    (outcome,) = case.run(canonicalize_linear)
    assert reasons(outcome) == ["the linear without the bias is used elsewhere"]


def test_a_residual_is_no_bias() -> None:
    case = Case(lambda m, x, y: F.linear(x, m.w) + y, draw(3, 5, 4), draw(3, 5, 6), w=W)
    (outcome,) = case.run(canonicalize_linear)
    assert outcome.matched == 0


def test_refuses_reshapes_that_move_more() -> None:
    case = Case(
        lambda m, x: F.linear(x.flatten(0, 1), m.w).reshape(5, 3, 6), draw(3, 5, 4), w=W, dynamic=False
    )
    outcome = case.run(canonicalize_views, canonicalize_linear)[-1]
    assert reasons(outcome) == ["the reshapes around the linear do more than merge and restore leading axes"]
    case.assert_same_numbers(exact=False)


def test_refuses_to_unflatten_when_the_flat_result_is_needed() -> None:
    def function(m: Any, x: Tensor) -> Any:
        y = F.linear(x.flatten(0, 1), m.w)
        return y.view(*x.shape[:2], 6), y.relu()

    case = Case(function, draw(3, 5, 4), w=W)
    outcome = case.run(canonicalize_views, canonicalize_linear)[-1]
    assert reasons(outcome) == ["the linear on the merged axes is used elsewhere"]


def test_stored_bytes_are_a_constant_matrix() -> None:
    from torchweld.graph.ops import dequantize  # noqa: F401  # registers the op

    def function(m: Any, x: Tensor) -> Tensor:
        return x @ torch.ops.torchweld.dequantize(m.data, "F32", 4).t()

    data = draw(6, 4).float().contiguous().view(torch.uint8)
    case = Case(function, draw(3, 5, 4).float(), data=data)
    run_pass(case.graph_module, canonicalize_views)
    assert run_pass(case.graph_module, canonicalize_linear).applied == 1
    assert run_pass(case.graph_module, fold_constants).applied == 0
    assert case.count(torch.ops.torchweld.dequantize.default) == 1
