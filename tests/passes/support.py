"""What every pass test needs: a captured function, passes applied to it, and the numbers before and after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import PassOutcome, run_pass

aten = torch.ops.aten
Dynamic = bool | dict[str, Sequence[int]]


class Holder(nn.Module):
    """A function with weights: `Holder(lambda m, x: x @ m.w, w=tensor)`."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of order one, the same in every run."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype)


class Case:
    """One captured function and its inputs."""

    def __init__(
        self, function: Callable[..., Any], *inputs: Tensor, dynamic: Dynamic = True, **weights: Tensor
    ) -> None:
        self.model = Holder(function, **weights).eval()
        self.inputs = inputs
        chosen: Any = dynamic
        self.program: Program = capture(self.model, inputs, dynamic=chosen, verify=False)
        self.before = copy.deepcopy(self.model(*inputs))

    @property
    def graph_module(self) -> fx.GraphModule:
        return self.program.graph_module

    def run(self, *passes: Any) -> list[PassOutcome]:
        """Apply passes in order; a second application of the last must find nothing to do."""
        outcomes = [run_pass(self.graph_module, pass_) for pass_ in passes]
        assert run_pass(self.graph_module, passes[-1]).applied == 0, "not idempotent"
        return outcomes

    def count(self, target: object) -> int:
        return sum(node.target is target for node in self.graph_module.graph.nodes)

    def only(self, target: object) -> fx.Node:
        (node,) = (node for node in self.graph_module.graph.nodes if node.target is target)
        return node

    def node_targets(self) -> list[str]:
        return [str(node.target) for node in self.graph_module.graph.nodes if node.op == "call_function"]

    def assert_same_numbers(self, *inputs: Tensor, exact: bool = True) -> None:
        """The graph gives what the function gives, on the example or on `inputs`; also that metas tell the truth."""
        chosen = inputs or self.inputs
        tolerance = 0.0 if exact else 1e-12
        expected, found = self.model(*chosen), self.program.run(*chosen)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        if not inputs:
            check_metas(self.graph_module, self.inputs)


def check_metas(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Every node's meta has the dtype and rank of what it computes, and its fixed sizes."""

    class Checker(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            value = n.meta.get("val")
            if isinstance(value, Tensor):
                assert value.dtype == result.dtype, f"{n.format_node()}: {value.dtype} is {result.dtype}"
                assert value.dim() == result.dim(), n.format_node()
                for said, size in zip(value.shape, result.shape, strict=True):
                    assert not isinstance(said, int) or said == size, n.format_node()
            return result

    with torch.no_grad():
        Checker(graph_module).run(*inputs)


def reasons(outcome: PassOutcome) -> list[str]:
    return [refusal.reason for refusal in outcome.refused]
