"""What the tests of groups, fusions and lowering need: a function as a group graph, fused, run and printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tests.passes.support import Case, Dynamic, draw
from tests.pipeline.stages import run_interpreted
from torchweld.codegen.build_plan import BuiltPlan, build_plan
from torchweld.codegen.formula import formula
from torchweld.codegen.ir import Kernel
from torchweld.codegen.lower import LoweredGroup, Lowerer, lower_group
from torchweld.codegen.naming import operation_name
from torchweld.graph.cost import pricing
from torchweld.graph.fusion import FusionOutcome, FusionPass, Measure, run_fusion
from torchweld.graph.groups import Group, GroupGraph, has_tensor, is_free
from torchweld.graph.partition import fused_module
from torchweld.graph.target import Target
from torchweld.optimizer.pipeline import group_names, size_hints

#: Launches are dear and arithmetic is nearly free: whatever is legal pays.
EAGER_TO_FUSE = Target("eager to fuse", 10.0, 1000.0, 1000.0, 1000.0, 20.0, 1 << 20, 0, 2)
#: Launches and memory are nearly free, arithmetic is dear and each of the many cores does prologues again.
NO_RECOMPUTATION = Target("no recomputation", 1e6, 1.0, 1.0, 1.0, 1e-6, 1 << 20, 0, 64)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Float32 numbers of order one, the same in every run."""
    return draw(*shape, seed=seed, dtype=torch.float32)


class FusionCase(Case):
    """A function of float32 tensors as a group graph on `target`; `fuse` runs passes over it."""

    def __init__(
        self,
        function: Callable[..., Any],
        *inputs: Tensor,
        target: Target = EAGER_TO_FUSE,
        dynamic: Dynamic = False,
        **weights: Tensor,
    ) -> None:
        super().__init__(function, *inputs, dynamic=dynamic, **weights)
        hints = size_hints(self.program, self.inputs)
        self.lowerer = Lowerer(target.cores)
        self.groups = GroupGraph.of(self.graph_module, self.lowerer, pricing(target, hints), hints)

    def fuse(self, *passes: FusionPass, measure: Measure | None = None) -> FusionOutcome:
        """Run passes in order; the last one, run again, must find nothing to do.  Gives the last's outcome."""
        outcomes = [run_fusion(self.groups, pass_, measure=measure) for pass_ in passes]
        assert run_fusion(self.groups, passes[-1], measure=measure).applied == 0, "not idempotent"
        return outcomes[-1]

    def ops(self) -> list[str]:
        """The operations of every group, in the order of running: `["rms_norm linear linear", "cumsum"]`."""
        return [" ".join(map(operation_name, group.nodes)) for group in self.groups.topological()]

    def group_of(self, op: str, occurrence: int = 0) -> Group:
        """The group that holds the n-th operation of this name."""
        nodes = [node for node in self.groups.owner if operation_name(node) == op]
        return self.groups.groups[self.groups.owner[nodes[occurrence]]]

    def kernel(self, op: str) -> Kernel:
        """The kernel of the group that holds this operation."""
        return kernel_of(self.groups, self.group_of(op))

    def plan(self) -> BuiltPlan:
        """The plan of the groups as they are now."""
        return build_plan(self.groups)

    def assert_fused_numbers(self, *inputs: Tensor) -> None:
        """The fused graph equals the source bit for bit; its kernels, interpreted, to rounding."""
        chosen = inputs or self.inputs
        expected = self.graph_module(*chosen)
        fused = fused_module(self.groups, group_names(self.groups))
        torch.testing.assert_close(fused(*chosen), expected, rtol=0, atol=0)
        interpreted = run_interpreted(self.plan(), chosen)
        assert len(interpreted) == len(expected)
        for found, value in zip(interpreted, expected, strict=True):
            if isinstance(value, Tensor):
                assert isinstance(found, Tensor) and found.shape == value.shape
                torch.testing.assert_close(found, value, rtol=2e-6, atol=2e-6)

    def text(self) -> str:
        """Every group as a line, and what its kernel computes."""
        lines: list[str] = []
        for group in self.groups.topological():
            outputs, inputs = _names(group.outputs), _names(group.inputs)
            lines.append(f"{outputs} = [{' '.join(map(operation_name, group.nodes))}]({inputs})")
            if group.eager is None:
                kernel = kernel_of(self.groups, group)
                lines += [f"    {line}" for line in (f"kernel {kernel.name}", *formula(kernel))]
            else:
                lines.append(f"    eager: {group.eager}")
        return "\n".join(lines) + "\n"


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(node.name for node in nodes)


def reasons(outcome: FusionOutcome) -> dict[str, int]:
    """How often each reason was given."""
    return {refusal.reason: times for refusal, times in outcome.refused}


def kernel_of(groups: GroupGraph, group: Group) -> Kernel:
    """The kernel of a group."""
    lowered = groups.lowered[group.id]
    assert isinstance(lowered, LoweredGroup)
    return lowered.kernel


def whole(case: Case) -> Group:
    """All computing nodes of a function as one group."""
    nodes = case.graph_module.graph.nodes
    return Group(0, tuple(n for n in nodes if n.op == "call_function" and has_tensor(n) and not is_free(n)))


def lower(
    function: Callable[..., Any], *inputs: Tensor, dynamic: Dynamic = False, **weights: Tensor
) -> LoweredGroup:
    """The whole of a function as one kernel; Unsupported where there is none."""
    return lower_group(whole(Case(function, *inputs, dynamic=dynamic, **weights)), cores=2)
