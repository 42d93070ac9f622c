"""canonicalize_views: two ops for all views."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.rewrite import run_pass
from torchweld.passes import canonicalize_views

VIEWS = {"aten.reshape.default", "aten.permute.default", "aten.expand.default", "aten.slice.Tensor"}
ALLOWED = VIEWS | {"aten.sym_size.int", "<built-in function mul>"}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, x: x.view(x.shape[0], x.shape[1], 2, 4), "aten.reshape.default"),
        (lambda m, x: x.unsqueeze(1), "aten.reshape.default"),
        (lambda m, x: x.unsqueeze(-1), "aten.reshape.default"),
        (lambda m, x: x.unsqueeze(0).squeeze(0).flatten(1), "aten.reshape.default"),
        (lambda m, x: x.unflatten(-1, (4, 2)), "aten.reshape.default"),
        (lambda m, x: x.unsqueeze(2).squeeze(2).reshape(-1, 4), "aten.reshape.default"),
        (lambda m, x: x.transpose(1, 2), "aten.permute.default"),
        (lambda m, x: x.swapaxes(0, -1), "aten.permute.default"),
        (lambda m, x: x.movedim(0, 2), "aten.permute.default"),
        (lambda m, x: torch.movedim(x, (0, 2), (1, 0)), "aten.permute.default"),
        (lambda m, x: x.transpose(0, 1).permute(2, 0, 1), "aten.permute.default"),
        (lambda m, x: x[:, :1].expand_as(x), "aten.expand.default"),
    ],
)
def test_one_spelling(function: Callable[..., Any], expected: str) -> None:
    case = Case(function, draw(3, 5, 8))
    (outcome,) = case.run(canonicalize_views)
    assert outcome.applied >= 1 and not outcome.refused
    assert set(case.node_targets()) <= ALLOWED
    assert expected in case.node_targets()
    case.assert_same_numbers()
    case.assert_same_numbers(draw(2, 4, 8, seed=1))


def test_views_of_views_are_one_view() -> None:
    case = Case(lambda m, x: x.view(x.shape[0], -1, 2, 2).view(x.shape[0], -1, 4).unsqueeze(0), draw(3, 5, 4))
    case.run(canonicalize_views)
    assert case.count(aten.reshape.default) == 1
    case.assert_same_numbers(draw(2, 7, 4))


def test_permutes_of_permutes_compose_in_the_right_order() -> None:
    case = Case(lambda m, x: x.permute(1, 2, 0).permute(1, 2, 0), draw(3, 5, 4))
    case.run(canonicalize_views)
    assert case.only(aten.permute.default).args[1] == [2, 0, 1]
    case.assert_same_numbers()


def test_a_lone_symbolic_size_is_minus_one() -> None:
    case = Case(lambda m, x: x.unsqueeze(1), draw(3, 4, 5, 6))
    case.run(canonicalize_views)
    assert case.only(aten.reshape.default).args[1] == [-1, 1, 4, 5, 6]


def test_refuses_to_squeeze_a_size_that_is_not_fixed() -> None:
    case = Case(lambda m, x: x.squeeze(1), draw(3, 5, 4))
    squeeze = case.only(aten.squeeze.dim)
    (outcome,) = case.run(canonicalize_views)
    assert reasons(outcome) == ["a squeezed size is not fixed"]
    assert outcome.refused[0].node is squeeze
    case.assert_same_numbers()


def test_refuses_when_two_symbolic_sizes_cannot_be_read() -> None:
    case = Case(lambda m, x: x.unsqueeze(1), draw(3, 5, 4))
    sums = Case(
        lambda m, x, y: x.new_zeros(x.shape[0] + y.shape[0], 1, x.shape[1] + y.shape[1], 4),
        draw(3, 5, 4),
        draw(2, 6, 4),
    )
    case.only(aten.unsqueeze.default).meta["val"] = sums.only(aten.new_zeros.default).meta["val"]
    outcome = run_pass(case.graph_module, canonicalize_views)
    assert reasons(outcome) == ["a symbolic size of the result cannot be read from any node"]


def test_reads_products_of_sizes() -> None:
    case = Case(lambda m, x: x.flatten(1, 2).unsqueeze(0), draw(3, 5, 4))
    case.run(canonicalize_views)
    assert case.count(aten.reshape.default) == 1
    case.assert_same_numbers(draw(2, 7, 4))


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(["transpose", "merge", "split", "unsqueeze", "swap"]), min_size=1, max_size=6)
)
def test_any_chain_keeps_its_numbers(steps: list[str]) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        for step in steps:
            if step == "transpose":
                x = x.transpose(-1, -2)
            elif step == "merge" and x.dim() > 2:
                x = x.flatten(-2)
            elif step == "split" and x.shape[-1] % 2 == 0:
                x = x.unflatten(-1, (2, x.shape[-1] // 2))
            elif step == "unsqueeze":
                x = x.unsqueeze(1)
            elif step == "swap":
                x = x.movedim(0, -1)
        return x.contiguous()

    case = Case(function, draw(3, 4, 8), dynamic=False)
    case.run(canonicalize_views)
    case.assert_same_numbers()
