"""canonicalize_arithmetic: one spelling per elementwise idea."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.rewrite import run_pass
from torchweld.passes import canonicalize_arithmetic


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x**2, ["mul.Tensor"]),
        (lambda m, x: x.square(), ["mul.Tensor"]),
        (lambda m, x: x.abs() ** 0.5, ["abs.default", "sqrt.default"]),
        (lambda m, x: x.abs() ** -0.5, ["abs.default", "rsqrt.default"]),
        (lambda m, x: x * -1, ["neg.default"]),
        (lambda m, x: -1.0 * x, ["neg.default"]),
        (lambda m, x: 2 - x, ["neg.default", "add.Tensor"]),
        (lambda m, x: torch.rsub(x, x * 2), ["mul.Tensor", "sub.Tensor"]),
        (lambda m, x: torch.true_divide(x, 3.0), ["div.Tensor"]),
        (lambda m, x: x.masked_fill(x > 0, 1.5), ["gt.Scalar", "where.ScalarSelf"]),
        (lambda m, x: x.masked_fill(x > 0, m.fill), ["gt.Scalar", "where.ScalarSelf"]),
        (lambda m, x: torch.where(x > 0, x, m.fill), ["gt.Scalar", "where.ScalarOther"]),
        (lambda m, x: torch.where(x > 0, m.fill, x), ["gt.Scalar", "where.ScalarSelf"]),
        (lambda m, x: (x > 0) & (x < 1), ["gt.Scalar", "lt.Scalar", "logical_and.default"]),
        (lambda m, x: (x > 0) | (x < -1), ["gt.Scalar", "lt.Scalar", "logical_or.default"]),
        (lambda m, x: ~(x > 0), ["gt.Scalar", "logical_not.default"]),
    ],
)
def test_one_spelling(function: Callable[..., Any], expected: list[str]) -> None:
    case = Case(function, draw(3, 4), fill=torch.tensor(2.5, dtype=torch.float64))
    case.run(canonicalize_arithmetic)
    assert [target.removeprefix("aten.") for target in case.node_targets()] == expected
    case.assert_same_numbers()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: torch.bmm(x, x.mT), {"matmul.default"}),
        (lambda m, x: torch.baddbmm(x @ x.mT, x, x.mT), {"matmul.default", "add.Tensor"}),
        (
            lambda m, x: torch.baddbmm(x @ x.mT, x, x.mT, beta=2, alpha=0.5),
            {"matmul.default", "add.Tensor", "mul.Tensor"},
        ),
        (lambda m, x: torch.baddbmm((x @ x.mT) / 0, x, x.mT, beta=0), {"matmul.default"}),
    ],
)
def test_batched_products_are_matmul(function: Callable[..., Any], expected: set[str]) -> None:
    case = Case(function, draw(2, 3, 4))
    case.run(canonicalize_arithmetic)
    found = {target.removeprefix("aten.") for target in case.node_targets()}
    assert expected <= found and not {"bmm.default", "baddbmm.default"} & found
    case.assert_same_numbers(exact=False)


def test_integers_keep_their_bitwise_operators() -> None:
    case = Case(lambda m, n: (n & 3) + (n | 4) + ~n, torch.arange(6).reshape(2, 3))
    outcome = run_pass(case.graph_module, canonicalize_arithmetic)
    assert outcome.applied == 0
    case.assert_same_numbers()


def test_an_integer_power_that_widens_stays() -> None:
    case = Case(lambda m, n: n**0.5, torch.arange(6).reshape(2, 3))
    assert run_pass(case.graph_module, canonicalize_arithmetic).applied == 0
    case.assert_same_numbers()


def test_refuses_rsub_with_alpha() -> None:
    case = Case(lambda m, x: torch.rsub(x, 2.0, alpha=3), draw(2, 3))
    (outcome,) = case.run(canonicalize_arithmetic)
    assert reasons(outcome) == ["rsub has an alpha"]
    case.assert_same_numbers()


def test_refuses_a_fill_value_that_is_computed() -> None:
    case = Case(lambda m, x: x.masked_fill(x > 0, x.sum()), draw(2, 3))
    (outcome,) = case.run(canonicalize_arithmetic)
    assert reasons(outcome) == ["the value that fills is not a constant number"]
    case.assert_same_numbers()


def test_refuses_a_fill_that_widens() -> None:
    case = Case(lambda m, x: x[:1].masked_fill(m.mask, 1.0), draw(2, 3), mask=torch.tensor([[True], [False]]))
    (outcome,) = case.run(canonicalize_arithmetic)
    assert reasons(outcome) == ["masked_fill widens its input"]
    case.assert_same_numbers()


def test_a_scalar_of_another_dtype_does_not_replace_a_tensor_that_widens() -> None:
    case = Case(
        lambda m, x: torch.where(x > 0, x, m.fill),
        draw(2, 3).float(),
        fill=torch.ones(1, 1, dtype=torch.float64),
    )
    case.run(canonicalize_arithmetic)
    assert case.count(aten.where.self) == 1
    case.assert_same_numbers()


def test_refuses_rsub_of_booleans() -> None:
    case = Case(lambda m, x: torch.rsub((x > 0).long(), 2), draw(2, 3))
    node = case.only(aten.rsub.Scalar)
    node.args = (node.args[0].args[0], 2)
    assert reasons(run_pass(case.graph_module, canonicalize_arithmetic)) == ["rsub of booleans"]
