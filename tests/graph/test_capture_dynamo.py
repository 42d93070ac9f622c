"""Dynamo's graphs in program form: composites, bound parameters, sizes, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import fx, nn

from torchweld.graph.capture_dynamo import bind_inputs, capture_dynamo, is_static, number_positions
from torchweld.graph.program import Program

aten = torch.ops.aten


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def recording_backend(seen: list[Program]) -> Callable[..., Callable[..., Sequence[object]]]:
    """A backend that runs the bound program and records it."""

    def backend(
        graph_module: fx.GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., Sequence[object]]:
        program = capture_dynamo(graph_module, example_inputs)

        def run(*inputs: object) -> Sequence[object]:
            fixed = {i: v for i, v in enumerate(inputs) if isinstance(v, torch.Tensor) and is_static(v)}
            numbers = {i: float(inputs[i]) for i in number_positions(program)}  # type: ignore[arg-type]
            bound = bind_inputs(program, fixed, numbers)
            seen.append(bound)
            result: Sequence[object] = bound.graph_module(
                *[v for i, v in enumerate(inputs) if i not in fixed and i not in numbers]
            )
            return result

        return run

    return backend


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_parameters_become_stored_tensors_and_composites_stay() -> None:
    seen: list[Program] = []
    model = Mlp().eval().requires_grad_(False)
    compiled = torch.compile(model, backend=recording_backend(seen), dynamic=True)
    for batch, length in ((2, 5), (3, 7)):
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(compiled(x), model(x))
    bound = seen[-1]
    stored = dict(bound.graph_module.named_parameters())
    assert set(stored) == set(model.state_dict())
    assert stored["up.weight"].data_ptr() == model.up.weight.data_ptr()
    targets = {node.target for node in bound.graph.nodes}
    assert {aten.linear.default, aten.layer_norm.default, aten.gelu.default} <= targets
    assert not any("item" in str(target) for target in targets)
    shape = (
        next(
            n
            for n in bound.placeholders
            if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dim() == 3
        )
        .meta["val"]
        .shape
    )
    assert not isinstance(shape[0], int) and not isinstance(shape[1], int)


def test_writes_to_own_values_become_functional_and_to_inputs_are_refused() -> None:
    def paint(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 0] = 1
        return y.relu_()

    seen: list[Program] = []
    x = torch.randn(4, 3)
    assert torch.equal(torch.compile(paint, backend=recording_backend(seen))(x), paint(x))
    assert not any("_." in str(n.target) for n in seen[-1].graph.nodes if n.op == "call_function")

    def overwrite(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    with pytest.raises(Exception, match="the compiled code writes to its inputs"):
        torch.compile(overwrite, backend=recording_backend([]))(x)
