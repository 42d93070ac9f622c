"""Nodes made by `graph/edit.py` have true metadata, and impossible ones are refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from torchweld.graph.capture import capture
from torchweld.graph.edit import (
    EditError,
    drop_unused_tensors,
    erase_dead,
    insert_node,
    insert_weight,
    replace,
    size_of,
)
from torchweld.graph.program import Program, get_tensor

aten = torch.ops.aten


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def program() -> Program:
    return capture(Small(), (torch.randn(2, 5, 4),))


def only(program: Program, target: object) -> fx.Node:
    (node,) = [n for n in program.graph.nodes if n.target is target]
    return node


def test_insert_node_runs_the_shape_rule_and_copies_the_source(program: Program) -> None:
    relu = only(program, aten.relu.default)
    new = insert_node(
        program.graph, relu, aten.sum.dim_IntList, (relu.args[0], [-1], True), made_by="t", like=relu
    )
    value = new.meta["val"]
    assert value.shape[-1] == 1 and value.dtype is torch.float32
    assert [str(s) for s in value.shape[:2]] == [str(s) for s in relu.meta["val"].shape[:2]]
    assert new.meta["made_by"] == "t"
    assert new.meta["stack_trace"] == relu.meta["stack_trace"]
    assert list(program.graph.nodes).index(new) < list(program.graph.nodes).index(relu)


def test_replace_keeps_the_graph_runnable(program: Program) -> None:
    relu = only(program, aten.relu.default)
    new = insert_node(program.graph, relu, aten.clamp_min.default, (relu.args[0], 0), made_by="t", like=relu)
    x = torch.randn(3, 7, 4)
    before = program.run(x)
    replace(relu, new)
    assert erase_dead(program.graph) == 1
    program.graph.lint()
    program.graph_module.recompile()
    after = program.run(x)
    assert isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    assert torch.equal(before, after)


def test_replace_by_a_wrapper_of_itself(program: Program) -> None:
    relu = only(program, aten.relu.default)
    with program.graph.inserting_after(relu):
        after = relu.next
    twice = insert_node(program.graph, after, aten.mul.Tensor, (relu, 2.0), made_by="t", like=relu)
    replace(relu, twice)
    assert twice.args[0] is relu and relu not in only_users(twice)


def only_users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


@pytest.mark.parametrize("kind", ["dtype", "rank", "size"])
def test_replace_refuses_another_value(program: Program, kind: str) -> None:
    relu = only(program, aten.relu.default)
    target, args = {
        "dtype": (aten.gt.Scalar, (relu.args[0], 0)),
        "rank": (aten.unsqueeze.default, (relu.args[0], 0)),
        "size": (aten.slice.Tensor, (relu.args[0], 2, 0, 4)),
    }[kind]
    new = insert_node(program.graph, relu, target, args, made_by="t", like=relu)
    with pytest.raises(EditError, match="must keep dtype and shape"):
        replace(relu, new)


def test_insert_node_refuses_what_cannot_be(program: Program) -> None:
    relu = only(program, aten.relu.default)
    with pytest.raises(EditError, match=r"bad_pass: aten.mm.default.*test_edit.py"):
        insert_node(program.graph, relu, aten.mm.default, (relu.args[0],) * 2, made_by="bad_pass", like=relu)
    size = relu.meta["val"].shape[0]
    with pytest.raises(EditError, match="bare SymInt"):
        insert_node(program.graph, relu, aten.full.default, ([size], 1.0), made_by="t", like=relu)


def test_size_of_reads_symbolic_sizes_once_and_returns_fixed_ones(program: Program) -> None:
    relu = only(program, aten.relu.default)
    source = program.placeholders[0]
    batch = size_of(program.graph, relu, source, 0, made_by="t")
    assert isinstance(batch, fx.Node)
    assert size_of(program.graph, relu, source, -3, made_by="t") is batch
    assert size_of(program.graph, relu, source, -1, made_by="t") == 4


def test_a_shape_question_does_not_fix_a_size(program: Program) -> None:
    """`view` to a size that the traced example happens to allow must not turn the batch into a constant."""
    relu = only(program, aten.relu.default)
    before = [str(size) for size in relu.meta["val"].shape]
    environment = program.fake_mode.shape_env
    assert environment is not None
    guards = len(environment.guards)
    batch = size_of(program.graph, relu, program.placeholders[0], 0, made_by="t")
    insert_node(
        program.graph, relu, aten.view.default, (relu.args[0], [batch, -1, 2, 4]), made_by="t", like=relu
    )
    assert len(environment.guards) == guards
    assert [str(size) for size in relu.meta["val"].shape] == before


def test_weights_are_stored_and_dropped(program: Program) -> None:
    linear = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    doubled = get_tensor(program.graph_module, "first.weight") * 2
    weight = insert_weight(program.graph_module, linear, "folded.first", doubled, made_by="t", like=linear)
    x = torch.randn(1, 1, 4)
    program.run(x)
    linear.update_arg(1, weight)
    erase_dead(program.graph)
    program.graph_module.recompile()
    assert drop_unused_tensors(program.graph_module) == 1
    names = set(program.graph_module.state_dict())
    assert names == {"folded.first", "first.bias", "second.weight", "second.bias"}
    program.run(x)
