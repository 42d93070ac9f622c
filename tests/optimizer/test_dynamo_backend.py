"""`torch.compile(model, backend=torchweld)`: numbers, several modules on one graph, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchweld.optimizer.dynamo_backend import backend


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_equals_eager_at_many_sizes() -> None:
    model = Mlp().eval()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 7), (1, 1)):
            x = torch.randn(batch, length, 8)
            torch.testing.assert_close(compiled(x), model(x))


def test_two_modules_that_share_a_graph_keep_their_own_weights() -> None:
    first, second = Mlp().eval(), Mlp().eval()

    def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x)

    compiled = torch.compile(call, backend=backend, dynamic=True)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        for model in (first, second, first):
            torch.testing.assert_close(compiled(model, x), model(x))


def test_gradients_run_eagerly_and_say_so_once() -> None:
    model = Mlp()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    x = torch.randn(2, 5, 8)
    with pytest.warns(UserWarning, match="needs gradients and runs eagerly") as caught:
        compiled(x).sum().backward()
        compiled(x)
    assert len([w for w in caught if "needs gradients" in str(w.message)]) == 1
    assert model.up.weight.grad is not None


def test_writing_to_an_input_runs_eagerly_with_the_reason() -> None:
    def overwrite(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    x = torch.ones(3)
    with pytest.warns(UserWarning, match="writes to its inputs"):
        result = torch.compile(overwrite, backend=backend)(x)
    assert torch.equal(x, torch.full((3,), 2.0)) and torch.equal(result, torch.full((3,), 4.0))
