"""Sub-graphs of groups, and the fused graph as a graph that runs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tests.passes.fusion_cases import FusionCase, numbers
from torchweld.graph.partition import extract, extract_group, free_tail, fused_module
from torchweld.optimizer.pipeline import group_names
from torchweld.passes import fuse_vertical


def calls(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


def test_a_sub_graph_takes_tensors_and_gives_what_others_read() -> None:
    case = FusionCase(lambda m, x, y: ((h := x.exp() + y), h.neg()), numbers(3, 4), numbers(3, 4, seed=1))
    nodes = [node for node in case.graph_module.graph.nodes if node.op == "call_function"][:2]
    sub = extract(nodes, nodes[-1:], "piece")
    assert [node.name for node in sub.inputs] == ["inputs_0", "inputs_1"]
    assert sub.outputs == (nodes[1],)
    x, y = case.inputs
    (result,) = sub.module(x, y)
    assert torch.equal(result, x.exp() + y)
    assert [n.meta["val"].shape for n in sub.module.graph.find_nodes(op="placeholder")] == [(3, 4), (3, 4)]


def test_sizes_come_after_tensors() -> None:
    case = FusionCase(
        lambda m, x: x.exp().reshape(x.shape[0] * x.shape[1], 4).neg(), numbers(2, 5, 4), dynamic=True
    )
    sub = extract_group(case.group_of("neg"))
    kinds = [isinstance(node.meta["val"], Tensor) for node in sub.inputs]
    assert kinds == sorted(kinds, reverse=True) and kinds[0] and not kinds[-1]
    fused = fused_module(case.groups, group_names(case.groups))
    other = numbers(3, 1, 4, seed=5)
    assert torch.equal(fused(other)[0], other.exp().reshape(3, 4).neg())


def test_every_group_is_one_call_in_order() -> None:
    case = FusionCase(lambda m, x: torch.cumsum(x.exp().neg(), 0).abs(), numbers(3, 4))
    case.fuse(fuse_vertical)
    names = group_names(case.groups)
    fused = fused_module(case.groups, names)
    order = [group.id for group in case.groups.topological()]
    assert calls(fused) == [f"{names[number]}_{number}" for number in order]
    assert [names[number] for number in order] == ["exp_neg", "eager", "abs"]
    assert torch.equal(fused(*case.inputs)[0], case.before)


def test_a_view_goes_into_the_kernels_that_read_it_and_stays_outside_for_eager_groups() -> None:
    case = FusionCase(lambda m, x: ((v := x.exp().transpose(0, 1)).neg(), torch.cumsum(v, 0)), numbers(3, 4))
    fused = fused_module(case.groups, group_names(case.groups))
    transpose = torch.ops.aten.transpose.int

    def count(module: fx.GraphModule) -> int:
        return len(module.graph.find_nodes(op="call_function", target=transpose))

    modules = [module for module in fused.children() if isinstance(module, fx.GraphModule)]
    assert ([count(module) for module in modules], count(fused)) == ([0, 1, 0], 1)
    assert all(torch.equal(a, b) for a, b in zip(fused(*case.inputs), case.before, strict=True))


def test_results_may_be_views_inputs_weights_and_numbers() -> None:
    case = FusionCase(
        lambda m, x: (x.exp().transpose(0, 1), x, m.w, x.neg()[0], x.transpose(0, 1)),
        numbers(3, 4),
        w=numbers(2),
    )
    fused = fused_module(case.groups, group_names(case.groups))
    results = fused(*case.inputs)
    assert len(results) == 5
    assert all(torch.equal(a, b) for a, b in zip(results, case.before, strict=True))


def test_free_tail_stops_at_finished_values() -> None:
    case = FusionCase(lambda m, x: x.exp().transpose(0, 1).reshape(6, 2), numbers(3, 4))
    result = case.graph_module.graph.output_node().all_input_nodes[0]
    exp = case.group_of("exp").nodes[0]
    tail = free_tail(result, {exp})
    assert tail[-1] is result and exp not in tail and len(tail) == 2
    assert free_tail(result, {exp, tail[0]}) == [result]
    assert free_tail(exp, set()) == [], "a computing node is no view"
    assert free_tail(result, {result}) == []


def test_weights_are_the_same_tensors() -> None:
    case = FusionCase(lambda m, x: x * m.w, numbers(3, 4), w=numbers(4))
    fused = fused_module(case.groups, group_names(case.groups))
    assert fused.w is case.graph_module.w
