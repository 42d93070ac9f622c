"""The float64 reference is one: nothing in the middle of a graph rounds it."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from torchweld.graph.float64 import (
    is_data_movement,
    reference_float64,
    rounding_spread,
    to_float64,
    unit_roundoff,
)
from torchweld.graph.formats import get_format
from torchweld.graph.ops import attention as _attention  # noqa: F401
from torchweld.graph.ops import dequantize as _dequantize  # noqa: F401

aten = torch.ops.aten
F64 = torch.float64


def _module(build: object, **weights: torch.Tensor) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    for name, tensor in weights.items():
        root.register_buffer(name, tensor)
    x = graph.placeholder("x")
    graph.output((build(graph, x, *(graph.get_attr(name) for name in weights)),))  # type: ignore[operator]
    return fx.GraphModule(root, graph)


def test_casts_constants_and_weights_do_not_round() -> None:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        y = graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.bfloat16})
        y = graph.call_function(aten.div.Tensor, (y, w))
        y = graph.call_function(aten.to.dtype, (y, torch.float16))
        c = graph.call_function(aten.full.default, ([], 0.1), {"dtype": torch.float32})
        return graph.call_function(aten.add.Tensor, (y, c))

    x, w = torch.rand(5), torch.rand(5).bfloat16() + 1
    (result,) = reference_float64(_module(build, w=w), (x,))
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, x.double() / w.double() + 0.1)


def test_integers_become_doubles_and_the_default_dtype_comes_back() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.div.Tensor, (x, 3))

    (result,) = reference_float64(_module(build), (torch.arange(5),))
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, torch.arange(5, dtype=F64) / 3)
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(RuntimeError):
        reference_float64(
            _module(lambda g, x: g.call_function(aten.mm.default, (x, x))), (torch.zeros(2, 3),)
        )
    assert torch.get_default_dtype() == torch.float32


def test_inputs_and_weights_that_are_outputs_are_doubles() -> None:
    weight_out = _module(lambda graph, x, w: w, w=torch.ones(2))
    input_out = _module(lambda graph, x: x)
    for module in (weight_out, input_out):
        (result,) = reference_float64(module, (torch.ones(2).half(),))
        assert isinstance(result, torch.Tensor) and result.dtype == F64


def test_own_operations_are_promoted() -> None:
    data = torch.zeros(3, get_format("Q8_0").row_bytes(32), dtype=torch.uint8)
    data[:, :2] = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    data[:, 2:] = 3

    def build(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        stored = graph.call_function(torch.ops.torchweld.dequantize.default, (w, "Q8_0", 32))
        y = graph.call_function(aten.linear.default, (x, stored))
        y = graph.call_function(aten.reshape.default, (y, [1, 1, 4, 3]))
        args = (y, y, y, None, "causal", 0, 0.5, 0.0)
        return graph.call_function(torch.ops.torchweld.attention.default, args)

    x = torch.randn(4, 32)
    (result,) = reference_float64(_module(build, w=data), (x,))
    y = (x.double().sum(-1, keepdim=True) * 1.5).expand(4, 3).reshape(1, 1, 4, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True, scale=0.5)
    assert isinstance(result, torch.Tensor) and result.dtype == F64
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_fused_groups_run_in_float64_too() -> None:
    inner = _module(lambda g, x: g.call_function(aten._to_copy.default, (x,), {"dtype": torch.float16}))
    root, graph = nn.Module(), fx.Graph()
    root.add_module("group", inner)
    x = graph.placeholder("x")
    graph.output((graph.call_function(operator.getitem, (graph.call_module("group", (x,)), 0)),))
    values = torch.rand(9)
    (result,) = reference_float64(fx.GraphModule(root, graph), (values,))
    assert isinstance(result, torch.Tensor) and torch.equal(result, values.double())


def test_bits_of_floats_have_no_float64_meaning_and_bits_of_bytes_have() -> None:
    as_int = _module(lambda g, x: g.call_function(aten.view.dtype, (x, torch.int32)))
    with pytest.raises(ValueError, match="reinterprets bits"):
        reference_float64(as_int, (torch.zeros(3),))
    as_half = _module(lambda g, x: g.call_function(aten.view.dtype, (x, torch.float16)))
    (result,) = reference_float64(as_half, (torch.tensor([1.5, -2.0]).half().view(torch.uint8),))
    assert isinstance(result, torch.Tensor) and result.tolist() == [1.5, -2.0] and result.dtype == F64


class _Upcasting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": torch.softmax(self.linear(x).to(torch.float32), -1, dtype=torch.float32).half()}


def test_a_module_that_was_never_captured_runs_in_float64_and_stays_as_it_was() -> None:
    module, x = _Upcasting().bfloat16(), torch.randn(3, 6).bfloat16()
    result = to_float64(module, (x,))
    assert isinstance(result, dict)
    expected = (x.double() @ module.linear.weight.double().t() + module.linear.bias.double()).softmax(-1)
    assert torch.allclose(result["y"], expected, rtol=1e-12)
    assert module.linear.weight.dtype == torch.bfloat16


def test_the_spread_has_the_size_of_the_rounding_and_is_reproducible() -> None:
    module = _module(lambda g, x: g.call_function(aten.mul.Tensor, (x, x)))
    x = torch.rand(50) + 1
    (spread,) = rounding_spread(module, (x,), torch.bfloat16)
    assert isinstance(spread, torch.Tensor)
    relative = spread / (x.double() ** 2)
    assert unit_roundoff(torch.bfloat16) * 0.5 < relative.max() < unit_roundoff(torch.bfloat16) * 4
    (again,) = rounding_spread(module, (x,), torch.bfloat16)
    assert isinstance(again, torch.Tensor) and torch.equal(spread, again)


def test_the_spread_of_data_movement_and_of_jumps_is_nothing() -> None:
    moved = _module(lambda g, x: g.call_function(aten.permute.default, (x, [1, 0])))
    assert is_data_movement(moved)
    (spread,) = rounding_spread(moved, (torch.rand(3, 4),), torch.float32)
    assert isinstance(spread, torch.Tensor) and not spread.any()
    chosen = _module(lambda g, x: g.call_function(aten.argmax.default, (x, -1)))
    assert not is_data_movement(chosen)
    assert rounding_spread(chosen, (torch.rand(3, 4),), torch.float32) == (None,)


def test_layer_norm_of_one_element_has_a_spread() -> None:
    """x * rstd - mean * rstd is not 0 in floats, however x is disturbed."""
    module = _module(lambda g, x: g.call_function(aten.layer_norm.default, (x, [1], None, None, 1e-5)))
    (spread,) = rounding_spread(module, (torch.rand(4, 1) + 1,), torch.float32)
    assert isinstance(spread, torch.Tensor) and bool((spread > 1e-7).all())
