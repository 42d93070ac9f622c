"""optimize(): function, decorator, class; signature, structures and state_dict of the source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import torchweld
from torchweld import optimize
from torchweld.graph.capture_errors import CaptureError
from torchweld.optimizer.api import MAX_PROGRAMS, NotOptimizedYet, OptimizedModule


class Block(nn.Module):
    """A norm, a gated MLP and a residual; `scale` is a plain argument."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, 24)
        self.up = nn.Linear(width, 24)
        self.down = nn.Linear(24, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        h = self.norm(x)
        return {"y": x + self.down(torch.nn.functional.silu(self.gate(h)) * self.up(h)) * scale}


@pytest.fixture(autouse=True)
def _no_grad_and_seed() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_module_without_inputs_is_captured_at_the_first_call_and_serves_every_size() -> None:
    model = Block().eval()
    fast = optimize(model)
    assert isinstance(fast, OptimizedModule)
    with pytest.raises(NotOptimizedYet, match="call it once"):
        _ = fast.report
    for batch, length in ((2, 5), (1, 1), (3, 17)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(fast(x)["y"], model(x)["y"], atol=1e-5, rtol=1e-5)
    assert len(fast.optimized.programs) == 1
    assert fast.report.eager_fallbacks == 0


def test_example_inputs_capture_at_once_and_keyword_arguments_are_part_of_the_structure() -> None:
    model = Block().eval()
    x = torch.randn(2, 5, 16)
    fast = optimize(model, (x,))
    assert fast.report.launches
    torch.testing.assert_close(fast(x, scale=0.5)["y"], model(x, scale=0.5)["y"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast(x)["y"], model(x)["y"], atol=1e-5, rtol=1e-5)
    assert len(fast.optimized.programs) == 2


def test_state_dict_parameters_and_attributes_are_those_of_the_source() -> None:
    model = Block().eval()
    fast = optimize(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert dict(fast.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert fast.gate is model.gate
    with pytest.raises(AttributeError):
        _ = fast.does_not_exist


@pytest.mark.parametrize("brackets", [False, True])
def test_decorator_on_a_function(brackets: bool) -> None:
    def attention(q: Tensor, k: Tensor) -> Tensor:
        """Scores."""
        return torch.softmax(q @ k.transpose(-1, -2) / 4.0, -1)

    fast = optimize(guide="model")(attention) if brackets else optimize(attention)
    q = torch.randn(2, 5, 16)
    torch.testing.assert_close(fast(q, q), attention(q, q), atol=1e-6, rtol=1e-5)
    assert fast.__name__ == "attention" and fast.__doc__ == "Scores."


@pytest.mark.parametrize("brackets", [False, True])
def test_decorator_on_a_class(brackets: bool) -> None:
    cls = optimize(threads=1)(Block) if brackets else optimize(Block)
    model = cls(16).eval()
    assert isinstance(model, Block) and cls.__name__ == "Block"
    x = torch.randn(2, 5, 16)
    expected = model.forward(x)["y"]
    torch.testing.assert_close(model(x)["y"], expected, atol=1e-5, rtol=1e-5)
    assert model.report.launches
    assert list(model.state_dict()) == list(Block(16).state_dict())


def test_too_many_structures_is_an_error_that_says_what_to_do() -> None:
    fast = optimize(lambda x, scale: x * scale)
    x = torch.randn(2, 3)
    for number in range(MAX_PROGRAMS):
        fast(x, float(number))
    with pytest.raises(CaptureError, match="at most"):
        fast(x, -1.0)


def test_wrong_targets_and_guides_are_refused() -> None:
    with pytest.raises(TypeError, match="takes a module"):
        optimize(3)
    with pytest.raises(ValueError, match="guide='fastest'"):
        optimize(Block(), guide="fastest")


def test_guide_measure_gives_the_same_numbers() -> None:
    model = Block().eval()
    x = torch.randn(2, 5, 16)
    fast = optimize(model, (x,), guide="measure", threads=1)
    torch.testing.assert_close(fast(x)["y"], model(x)["y"], atol=1e-5, rtol=1e-5)
    assert sum(record.applied for record in fast.report.passes if record.name.startswith("fuse_")) > 0


def test_verify_puts_the_error_into_the_report() -> None:
    fast = optimize(Block().eval(), (torch.randn(2, 5, 16),), verify=1)
    error = fast.report.max_relative_error
    assert error is not None and 0 < error < 1e-5


def test_torch_compile_backend_by_name() -> None:
    torch._dynamo.reset()
    model = Block().eval()
    x = torch.randn(2, 5, 16)
    fast = torch.compile(model, backend="torchweld")
    torch.testing.assert_close(fast(x)["y"], model(x)["y"], atol=1e-5, rtol=1e-5)


def test_public_names_exist_and_others_are_named_as_missing() -> None:
    for name in torchweld.__all__:
        assert getattr(torchweld, name) is not None
    with pytest.raises(AttributeError, match="public names are"):
        _ = torchweld.optimise
