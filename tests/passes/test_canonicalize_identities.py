"""canonicalize_identities: what gives back its input goes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.rewrite import run_pass
from torchweld.passes import canonicalize_identities, canonicalize_views


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.clone().relu(),
        lambda m, x: x.transpose(0, 1).contiguous().relu(),
        lambda m, x: x.detach().relu(),
        lambda m, x: x[:].relu(),
        lambda m, x: x[:, :, 0:8].relu(),
        lambda m, x: x.expand(x.shape).relu(),
        lambda m, x: x.reshape(x.shape).relu(),
        lambda m, x: x.permute(0, 1, 2).relu(),
        lambda m, x: x.double().relu(),
        lambda m, x: x.type_as(x).relu(),
        lambda m, x: (x * 1).relu(),
        lambda m, x: (1.0 * x).relu(),
        lambda m, x: (x / 1.0).relu(),
        lambda m, x: (x**1).relu(),
        lambda m, x: torch.cat([x, x[..., 8:]], -1).relu(),
        lambda m, x: torch.dropout(x, 0.5, False).relu(),
    ],
)
def test_removes(function: Callable[..., Any]) -> None:
    case = Case(function, draw(3, 5, 4, 8)[:, :, 0])
    case.run(canonicalize_views, canonicalize_identities)
    kept = {target for target in case.node_targets() if "sym_size" not in target}
    assert kept <= {"aten.relu.default", "aten.permute.default"}
    case.assert_same_numbers()
    case.assert_same_numbers(draw(2, 3, 8, seed=5))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, n: (n + 0) * 2,
        lambda m, n: (0 + n) * 2,
        lambda m, n: (n - 0) * 2,
    ],
)
def test_zero_is_neutral_for_integers(function: Callable[..., Any]) -> None:
    case = Case(function, torch.arange(6).reshape(2, 3))
    case.run(canonicalize_identities)
    assert case.node_targets() == ["aten.mul.Tensor"]
    case.assert_same_numbers()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + 0.0,  # -0.0 + 0.0 is 0.0
        lambda m, x: 0 * x,
        lambda m, x: 1 - x,
        lambda m, x: 1 / x,
        lambda m, x: x[:, 1:],
        lambda m, x: x[..., ::2],
        lambda m, x: x.repeat(1, 1, 2),
        lambda m, x: x.permute(0, 2, 1),
        lambda m, x: x * torch.ones(1, 1, 1, 1, dtype=x.dtype),  # widens
        lambda m, x: torch.cat([x, x], -1),
        lambda m, x: x.float(),
    ],
)
def test_keeps_what_changes_something(function: Callable[..., Any]) -> None:
    case = Case(function, draw(2, 4, 4))
    case.run(canonicalize_identities)
    assert {target for target in case.node_targets() if "sym_size" not in target}
    case.assert_same_numbers()


def test_a_repeat_of_nothing_may_add_axes() -> None:
    case = Case(lambda m, x: x.repeat(1, 1, 1).relu(), draw(2, 3), dynamic=False)
    case.run(canonicalize_identities)
    assert case.node_targets() == ["aten.reshape.default", "aten.relu.default"]
    case.assert_same_numbers()


def test_a_cast_has_one_spelling() -> None:
    case = Case(lambda m, x, y: x.to(torch.float32).relu() + x.type_as(y), draw(2, 3), draw(2, 3).float())
    case.run(canonicalize_identities)
    casts = case.graph_module.graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert [dict(cast.kwargs) for cast in casts] == [{"dtype": torch.float32}] * 2
    case.assert_same_numbers()


def test_refuses_to_alias_an_input() -> None:
    case = Case(lambda m, x: (x.clone(), x.transpose(0, 1).clone()), draw(2, 3))
    (outcome,) = case.run(canonicalize_identities)
    assert reasons(outcome) == ["the output would become an alias of an input or weight"] * 2 or reasons(
        outcome
    ) == ["the output would become an alias of an input or weight"]
    assert case.count(aten.clone.default) >= 1


def test_refuses_to_make_two_outputs_one() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = x.relu()
        return y, y.clone()

    case = Case(function, draw(2, 3))
    (outcome,) = case.run(canonicalize_identities)
    assert reasons(outcome) == ["two outputs would become one tensor"]
    first, second = case.graph_module(draw(2, 3))
    assert first.data_ptr() != second.data_ptr()


def test_refuses_training_dropout() -> None:
    case = Case(lambda m, x: x.relu().clone().neg(), draw(2, 3))
    clone = case.only(aten.clone.default)
    clone.target, clone.args = aten.dropout.default, (clone.args[0], 0.5, True)
    outcome = run_pass(case.graph_module, canonicalize_identities)
    assert reasons(outcome) == ["dropout is training"]
    clone.args = (clone.args[0], 0.5, False)
    assert run_pass(case.graph_module, canonicalize_identities).applied == 1


def test_removes_native_dropout_in_evaluation_only() -> None:
    case = Case(lambda m, x: x.relu().max(-1)[0].neg(), draw(2, 3))
    call = case.only(aten.max.dim)
    call.target, call.args = aten.native_dropout.default, (call.args[0], 0.5, True)
    outcome = run_pass(case.graph_module, canonicalize_identities)
    assert reasons(outcome) == ["dropout is training"]


def test_refuses_a_cast_that_moves() -> None:
    case = Case(lambda m, x: x.relu().to(torch.float32).neg(), draw(2, 3, 4, 5))
    (cast,) = [node for node in case.graph_module.graph.nodes if "to" in str(node.target)]
    cast.target, cast.args = aten._to_copy.default, cast.args[:1]
    cast.kwargs = {"dtype": torch.float32, "memory_format": torch.channels_last}
    outcome = run_pass(case.graph_module, canonicalize_identities)
    assert reasons(outcome) == ["the cast also changes device or memory format"]
