"""`torch.compile(model, backend="torchweld")`.

The graph is traced when Dynamo calls the backend; it is optimized at the first real call, when the
parameters are there to be folded and packed. Dynamo may serve several modules by one graph, so each set of
parameter objects gets an executable of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import fx

from torchweld.graph.capture_dynamo import bind_inputs, capture_dynamo, is_static, number_positions
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.program import Program
from torchweld.optimizer.api import optimize_program

Compiled = Callable[..., Sequence[object]]


def backend(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> Compiled:
    """Dynamo backend: takes its graph and fake inputs, returns a function of the real inputs.

    What cannot be captured, and every call that needs gradients, runs `graph_module` itself and says so
    once."""
    try:
        program = capture_dynamo(graph_module, example_inputs)
    except CaptureError as problem:
        warnings.warn(f"torchweld runs this graph eagerly: {problem}", stacklevel=2)
        return graph_module.forward
    return CompiledGraph(graph_module, program, optimize_program)


class CompiledGraph:
    """The optimized form of one Dynamo graph; calls `graph_module` where gradients are needed."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        program: Program,
        optimize: Callable[[Program], Callable[[list[torch.Tensor]], tuple[torch.Tensor, ...]]],
    ) -> None:
        self.graph_module, self.program, self.optimize = graph_module, program, optimize
        self.numbers = number_positions(program)
        self.executables: dict[tuple[float, ...], Executable] = {}
        self.warned = False

    def __call__(self, *inputs: object) -> Sequence[object]:
        """Run on real inputs (tensors and sizes), in the order of Dynamo's placeholders."""
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self._warn_about_gradients()
            result: Sequence[object] = self.graph_module(*inputs)
            return result
        fixed = {
            i: value for i, value in enumerate(inputs) if isinstance(value, torch.Tensor) and is_static(value)
        }
        numbers = {i: _number(inputs[i]) for i in self.numbers}
        key = (*(id(value) for value in fixed.values()), *numbers.values())
        if key not in self.executables:
            self.executables[key] = Executable(self, fixed, numbers)
        return self.executables[key](inputs)

    def _warn_about_gradients(self) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                "torchweld is for inference: this call needs gradients and runs eagerly; "
                "wrap it in torch.no_grad() or call model.requires_grad_(False)",
                stacklevel=3,
            )


class Executable:
    """The graph for one set of parameter objects and numbers; the objects are kept alive so that their ids
    stay theirs."""

    def __init__(
        self, compiled: CompiledGraph, fixed: dict[int, torch.Tensor], numbers: dict[int, float]
    ) -> None:
        self.fixed = fixed
        self.gone = {*fixed, *numbers}
        self.run = compiled.optimize(bind_inputs(compiled.program, fixed, numbers))

    def __call__(self, inputs: Sequence[object]) -> Sequence[object]:
        """Run on the inputs that are not parameters."""
        rest = [value for i, value in enumerate(inputs) if i not in self.gone]
        with torch.no_grad():
            return self.run(rest)  # type: ignore[arg-type]


def _number(value: object) -> float:
    """A Python float that came as a scalar tensor."""
    assert isinstance(value, torch.Tensor)
    return float(value)
