"""fold_constants: what depends on no input is computed once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.program import get_tensor
from torchweld.graph.rewrite import run_pass
from torchweld.passes import fold_constants


def test_folds_chains_and_keeps_the_weights() -> None:
    case = Case(lambda m, x: x * ((1 + m.w) * 2).sqrt(), draw(3, 4), w=draw(4).abs())
    outcome = case.run(fold_constants)[-1]
    assert outcome.applied == 3
    assert case.node_targets() == ["aten.mul.Tensor"]
    assert torch.equal(get_tensor(case.graph_module, "w"), draw(4).abs())
    case.assert_same_numbers()


def test_folds_factories() -> None:
    case = Case(
        lambda m, x: x + torch.arange(4, dtype=x.dtype) + torch.full((), 2.0, dtype=x.dtype), draw(3, 4)
    )
    case.run(fold_constants)
    assert set(case.node_targets()) == {"aten.add.Tensor"}
    case.assert_same_numbers()


def test_two_runs_do_not_reuse_a_name() -> None:
    case = Case(lambda m, x: x * (1 + m.w), draw(3, 4), w=draw(4))
    run_pass(case.graph_module, fold_constants)
    mul = case.only(aten.mul.Tensor)
    folded = mul.args[1]
    assert isinstance(folded, torch.fx.Node)
    with case.graph_module.graph.inserting_before(mul):
        again = case.graph_module.graph.create_node(
            "call_function", aten.add.Tensor, (folded, 1.0), name="add"
        )
    again.meta["val"] = folded.meta["val"]
    mul.args = (mul.args[0], again)
    run_pass(case.graph_module, fold_constants)
    names = {str(node.target) for node in case.graph_module.graph.nodes if node.op == "get_attr"}
    assert len(names) == 1 and torch.equal(get_tensor(case.graph_module, names.pop()), draw(4) + 2)


def test_a_folded_weight_is_called_after_its_weight() -> None:
    """GPT-2 stores its weights transposed: without their names no kernel of it belonged to a layer."""
    case = Case(lambda m, x: x @ m.w.t() + m.w.t().sum(), draw(3, 4), w=draw(4, 4))
    run_pass(case.graph_module, fold_constants)
    names = {str(node.target) for node in case.graph_module.graph.nodes if node.op == "get_attr"}
    assert all(name.startswith("folded.w") for name in names), names


def test_refuses_random_numbers() -> None:
    case = Case(lambda m, x: x + torch.rand(4, dtype=x.dtype), draw(3, 4))
    (outcome,) = case.run(fold_constants)
    assert len(outcome.refused) == 1 and "is random" in reasons(outcome)[0]


def test_stored_weights_stay_stored() -> None:
    from torchweld.graph.ops import dequantize  # noqa: F401  # registers the op

    data = draw(6, 4).float().contiguous().view(torch.uint8)
    case = Case(lambda m, x: x + torch.ops.torchweld.dequantize(m.data, "F32", 4), draw(6, 4), data=data)
    assert case.run(fold_constants)[-1].matched == 0
    assert case.count(torch.ops.torchweld.dequantize.default) == 1


def test_refuses_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_constants, "MAX_BYTES", 1024)
    case = Case(lambda m, x: x + m.w.repeat(100, 1), draw(500, 4), w=draw(5, 4), dynamic=False)
    (outcome,) = case.run(fold_constants)
    assert reasons(outcome) == ["the result takes 16000 bytes, its inputs 160"]


def test_a_view_may_be_as_large_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_constants, "MAX_BYTES", 8)
    case = Case(lambda m, x: x + m.w.expand(500, 4), draw(500, 4), w=draw(1, 4), dynamic=False)
    (outcome,) = case.run(fold_constants)
    assert outcome.applied == 1
    case.assert_same_numbers()


def test_refuses_sizes_that_are_not_fixed() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return x + m.w.repeat(3, 1)

    case = Case(function, draw(6, 4), w=draw(2, 4), dynamic=False)
    other = Case(lambda m, x: x.relu(), draw(6, 4))
    case.only(aten.repeat.default).meta["val"] = other.only(aten.relu.default).meta["val"]
    outcome = run_pass(case.graph_module, fold_constants)
    assert reasons(outcome) == ["the result has a size that is not fixed"]


def test_refuses_writes() -> None:
    case = Case(lambda m, x: x + (m.w + 1), draw(3, 4), w=draw(4))
    node = next(n for n in case.graph_module.graph.nodes if n.target is aten.add.Tensor and n.args[1] == 1)
    node.target = aten.add_.Tensor
    outcome = run_pass(case.graph_module, fold_constants)
    assert "writes" in reasons(outcome)[0]
    assert torch.equal(get_tensor(case.graph_module, "w"), draw(4))


def test_what_depends_on_an_input_stays() -> None:
    case = Case(lambda m, x: x.relu() + torch.arange(x.shape[0], dtype=x.dtype)[:, None], draw(3, 4))
    assert case.run(fold_constants)[-1].matched == 0
    case.assert_same_numbers(draw(7, 4))
