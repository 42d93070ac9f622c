"""From groups to a plan: steps in order, names, sizes, eager steps, results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from tests.passes.fusion_cases import FusionCase, numbers
from torchweld.codegen.build_plan import PlanRefused, build_plan
from torchweld.codegen.plan import EagerStep, Launch
from torchweld.passes import fuse_vertical


def steps(case: FusionCase) -> list[str]:
    return [step.kernel.name if isinstance(step, Launch) else "eager" for step in case.plan().plan.steps]


def test_launches_and_eager_steps_in_order() -> None:
    case = FusionCase(lambda m, x: torch.cumsum(x.exp(), 0).neg(), numbers(3, 4))
    built = case.plan()
    assert steps(case) == ["exp", "eager", "neg"]
    built.plan.check()
    order = [group.id for group in case.groups.topological()]
    assert built.step_groups == tuple(order)
    eager = built.plan.steps[1]
    assert isinstance(eager, EagerStep)
    assert eager.reason == "aten.cumsum.default: no rule gives its elements"
    assert (eager.arguments, eager.results) == (("exp",), ("cumsum",))
    case.assert_fused_numbers()


def test_a_launch_reads_and_writes_values_by_name() -> None:
    case = FusionCase(lambda m, x, r: F.linear(x, m.w) + r, numbers(3, 8), numbers(3, 6), w=numbers(6, 8))
    case.fuse(fuse_vertical)
    (launch,) = case.plan().plan.launches()
    assert (launch.read(), launch.written()) == (("inputs_0", "w", "inputs_1"), ("add",))


def test_constants_are_the_models_tensors() -> None:
    w = numbers(4)
    case = FusionCase(lambda m, x: x * m.w, numbers(3, 4), w=w)
    assert case.plan().plan.constants["w"].data_ptr() == case.model.get_buffer("w").data_ptr()


class Scales(nn.Module):
    """Three layers with a kernel each: the second and the third are equal."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, m: Any, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = torch.mul(x, factor)
        return x


def test_equal_kernels_share_a_name_and_different_ones_are_numbered() -> None:
    case = FusionCase(Scales(2.0, 2.0, 2.0, 3.0), numbers(3))
    assert steps(case) == ["mul", "mul_2", "mul_2", "mul_3"]
    launches = case.plan().plan.launches()
    assert launches[1].kernel is launches[2].kernel
    assert launches[0].kernel is not launches[1].kernel
    case.assert_fused_numbers()


def test_views_of_results_come_from_a_last_eager_step() -> None:
    case = FusionCase(lambda m, x: (x.exp().transpose(0, 1).reshape(6, 2), x.neg()), numbers(3, 4))
    built = case.plan()
    assert isinstance(built.plan.steps[-1], EagerStep) and built.step_groups[-1] is None
    assert built.plan.steps[-1].reason == "views of results"
    assert built.plan.steps[-1].results == built.plan.outputs[:1] and built.plan.outputs[1:] == ("neg",)
    case.assert_fused_numbers()


def test_inputs_and_weights_may_be_results() -> None:
    case = FusionCase(lambda m, x: (x, m.w, x.neg()), numbers(3, 4), w=numbers(2))
    built = case.plan()
    assert built.plan.outputs == ("inputs_0", "w", "neg")
    assert [at for at, _ in built.results] == [0, 1, 2]
    case.assert_fused_numbers()


def test_constants_among_the_results_are_kept_apart() -> None:
    """A captured graph may return a number: it is a result, but no value of the plan."""
    case = FusionCase(lambda m, x: (x.neg(), x.exp()), numbers(3, 4))
    output = case.graph_module.graph.output_node()
    first, second = output.all_input_nodes
    output.args = ((first, 7, second, None),)
    built = build_plan(case.groups)
    assert built.results == ((0, None), (None, 7), (1, None), (None, None))
    assert built.plan.outputs == (first.name, second.name)


def test_inputs_that_are_no_tensors_are_left_out() -> None:
    case = FusionCase(lambda m, x: x.neg(), numbers(3, 4))
    graph = case.graph_module.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("flag").meta["val"] = True
    built = build_plan(case.groups)
    assert built.tensor_inputs == (1,)
    assert [spec.name for spec in built.plan.inputs] == ["inputs_0"]


def test_an_eager_step_takes_sizes_by_name() -> None:
    case = FusionCase(
        lambda m, x: torch.cumsum(x.exp().reshape(x.shape[0] * x.shape[1], 4), 0),
        numbers(2, 5, 4),
        dynamic=True,
    )
    built = case.plan()
    eager = next(step for step in built.plan.steps if isinstance(step, EagerStep))
    assert set(eager.arguments) == {"exp", *built.plan.sizes}
    assert [node.op for node in eager.module.graph.nodes][: len(eager.arguments)] == ["placeholder"] * 3
    case.assert_fused_numbers(numbers(3, 1, 4, seed=2))


def test_the_arguments_of_an_eager_step_stand_before_its_views() -> None:
    """fx runs graphs whose placeholders come late; everybody who reads them expects them first."""
    case = FusionCase(
        lambda m, x, y: torch.searchsorted(x.abs().reshape(4, 3), y.neg()), numbers(3, 4), numbers(4, 2)
    )
    eager = next(step for step in case.plan().plan.steps if isinstance(step, EagerStep))
    ops = [node.op for node in eager.module.graph.nodes]
    assert ops == ["placeholder", "placeholder", "call_function", "call_function", "output"]
    assert eager.arguments == ("abs_1", "neg")


def test_all_results_of_an_eager_operation_are_values() -> None:
    case = FusionCase(lambda m, x: (t := torch.topk(x, 2))[0].neg() + t[1], numbers(3, 4))
    eager = case.plan().plan.steps[0]
    assert isinstance(eager, EagerStep) and len(eager.results) == 2
    case.assert_fused_numbers()


def test_sizes_are_whole_dimensions_of_inputs() -> None:
    case = FusionCase(lambda m, x: F.softmax(x, -1), numbers(2, 5, 4), dynamic=True)
    plan = case.plan().plan
    assert plan.sizes == tuple(sorted((str(e) for e in plan.inputs[0].shape[:2]), key=lambda s: (len(s), s)))


def test_a_size_that_no_input_has_whole_is_refused() -> None:
    case = FusionCase(lambda m, x: F.softmax(x, -1), numbers(2, 5, 4), dynamic=True)
    (node,) = case.graph_module.graph.find_nodes(op="placeholder")
    node.meta["val"] = node.meta["val"].new_empty(2, 5, 4)
    with pytest.raises(PlanRefused, match=r"sizes s\d+, s\d+ are no whole dimension of any input"):
        build_plan(case.groups)


def test_a_size_that_only_the_data_tells_is_refused() -> None:
    """The message names the size and why."""
    case = FusionCase(lambda m, x: x.neg(), numbers(3, 4))
    (node,) = case.graph_module.graph.find_nodes(op="placeholder")
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        node.meta["val"] = torch.empty(environment.create_unbacked_symint(), 4)
    with pytest.raises(PlanRefused, match=r"size u\d+: u\d+ is only known after the data has been seen"):
        build_plan(case.groups)
