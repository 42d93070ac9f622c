"""eliminate_common_subexpressions: the same thing once, and only the same thing."""

from typing import Any

import torch
from torch import Tensor

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.rewrite import run_pass
from torchweld.passes import eliminate_common_subexpressions, remove_dead_code


def test_whole_chains_collapse_in_one_sweep() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return (x.relu() * 2 + m.w).tanh() - (x.relu() * 2 + m.w).tanh().neg()

    case = Case(function, draw(3, 4), w=draw(4))
    (outcome,) = case.run(eliminate_common_subexpressions)
    assert outcome.applied >= 4
    assert [case.count(target) for target in (aten.relu.default, aten.mul.Tensor, aten.tanh.default)] == [
        1,
        1,
        1,
    ]
    case.assert_same_numbers()


def test_types_of_literals_are_kept_apart() -> None:
    case = Case(lambda m, n: ((n + 1) * 1.0, (n + 1.0) * 1.0, n + True), torch.arange(4))
    before = case.count(aten.add.Tensor)
    case.run(eliminate_common_subexpressions)
    assert case.count(aten.add.Tensor) == before
    case.assert_same_numbers()


def test_minus_zero_is_not_zero() -> None:
    case = Case(lambda m, x: torch.copysign(x, 0.0) + torch.copysign(x, -0.0) * 2, draw(3))
    case.run(eliminate_common_subexpressions)
    assert case.count(aten.copysign.Scalar) == 2
    case.assert_same_numbers()


def test_different_order_of_operands_is_different() -> None:
    case = Case(lambda m, x, y: (x - y) * (y - x), draw(3), draw(3, seed=1))
    assert case.run(eliminate_common_subexpressions)[-1].matched == 0


def test_refuses_random_numbers() -> None:
    case = Case(lambda m, x: torch.rand_like(x) - torch.rand_like(x), draw(3, 4))
    (outcome,) = case.run(eliminate_common_subexpressions)
    assert len(outcome.refused) == 1 and "is random" in reasons(outcome)[0]


def test_refuses_to_make_two_outputs_one() -> None:
    case = Case(lambda m, x: (x.relu(), x.relu()), draw(3, 4))
    (outcome,) = case.run(eliminate_common_subexpressions)
    assert reasons(outcome) == ["both results are outputs"]
    first, second = case.graph_module(draw(3, 4))
    assert first.data_ptr() != second.data_ptr()


def test_refuses_writes() -> None:
    case = Case(lambda m, x: x.relu() + x.relu(), draw(3, 4))
    for node in case.graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
        node.target = aten.relu_.default
    outcome = run_pass(case.graph_module, eliminate_common_subexpressions)
    assert len(outcome.refused) == 1 and "writes" in reasons(outcome)[0]


def test_dead_code_goes_and_writes_stay() -> None:
    case = Case(lambda m, x: x.relu() + 1, draw(3, 4))
    graph = case.graph_module.graph
    relu = case.only(aten.relu.default)
    with graph.inserting_after(relu):
        dead = graph.call_function(aten.tanh.default, (relu,))
    with graph.inserting_after(dead):
        graph.call_function(aten.neg.default, (dead,))
    with graph.inserting_after(relu):
        graph.call_function(aten.add_.Tensor, (relu, 1.0))
    outcome = run_pass(case.graph_module, remove_dead_code)
    assert reasons(outcome) == ["the node writes"]
    assert set(case.node_targets()) == {"aten.relu.default", "aten.add.Tensor", "aten.add_.Tensor"}
