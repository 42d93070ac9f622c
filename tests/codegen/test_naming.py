"""Names of kernels and buffers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.passes.fusion_cases import numbers, whole
from tests.passes.support import Case
from torchweld.codegen.naming import (
    MAX_NAME,
    buffer_hint,
    identifier,
    kernel_name,
    operation_name,
    owner_name,
    unique,
)
from torchweld.graph.ops import attention as _attention_op  # noqa: F401  registers torchweld::attention


@given(st.text())
def test_identifiers_are_legal_in_python_and_cpp(text: str) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", identifier(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj.weight", "q_proj_weight"),
        ("Layer", "layer"),
        ("3d", "v_3d"),
        ("", "value"),
        ("__x--y__", "x_y"),
        ("größe", "gr_e"),
        ("²", "value"),
    ],
)
def test_identifiers(text: str, expected: str) -> None:
    assert identifier(text) == expected


def test_unique_counts_from_two() -> None:
    assert unique("x", ()) == "x"
    assert unique("x", ("x", "x_2")) == "x_3"


def weight(name: str) -> fx.Node:
    graph = fx.Graph()
    return graph.create_node("get_attr", name)


@pytest.mark.parametrize(
    ("target", "owner", "buffer"),
    [
        ("layers.3.attn.q_proj.weight", "q_proj", "q_proj_weight"),
        ("model.layers.11.mlp.down.bias", "down", "down_bias"),
        ("embed.weight", "embed", "embed_weight"),
        ("weight", "weight", "weight"),
        ("layers.0.q_proj.weight.data", "q_proj", "weight_data"),
        ("scale", "scale", "scale"),
        ("blocks.2.norm.gain", "gain", "norm_gain"),
    ],
)
def test_names_of_weights(target: str, owner: str, buffer: str) -> None:
    """The number of the layer is left out: all layers share a kernel."""
    assert owner_name(weight(target)) == owner
    assert buffer_hint(weight(target)) == buffer


def test_names_of_inputs_and_operations() -> None:
    case = Case(lambda m, x: x.exp(), numbers(3), dynamic=False)
    first, call = list(case.graph_module.graph.nodes)[:2]
    assert (buffer_hint(first), buffer_hint(call), operation_name(call)) == ("inputs_0", "exp", "exp")


def test_one_of_several_results_is_named_after_what_gives_them() -> None:
    case = Case(lambda m, x: torch.topk(x, 2)[1], numbers(3, 5), dynamic=False)
    (_, call, item, *_) = case.graph_module.graph.nodes
    assert (operation_name(call), operation_name(item), buffer_hint(item)) == ("topk", "topk", "topk")


class Gated(nn.Module):
    """A norm, gate and up as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.gate_proj, self.up_proj = nn.Linear(8, 6, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, m: Any, x: Tensor) -> Tensor:
        n = self.norm(x)
        result: Tensor = F.silu(self.gate_proj(n)) * self.up_proj(n)
        return result


def name_of(function: Callable[..., Any], *inputs: Tensor, **weights: Tensor) -> str:
    return kernel_name(whole(Case(function, *inputs, dynamic=False, **weights)))


def test_a_kernel_is_called_by_its_norms_and_weights() -> None:
    assert name_of(Gated().requires_grad_(False), numbers(3, 8)) == "rms_norm_gate_proj_silu_up_proj"


def test_pointwise_work_names_a_kernel_only_if_it_is_alone() -> None:
    assert name_of(lambda m, x: (x.exp() * 2).neg(), numbers(3)) == "exp_mul_neg"
    assert name_of(lambda m, x: F.softmax(x.neg().abs(), -1), numbers(3)) == "softmax"


def test_a_residual_sum_is_named() -> None:
    assert name_of(lambda m, x: F.linear(x, m.w) + x, numbers(3, 8), w=numbers(8, 8)) == "w_add"


def test_at_most_five_pointwise_operations() -> None:
    assert name_of(lambda m, x: x.exp().neg().abs().sin().cos().tanh(), numbers(3)) == "exp_neg_abs_sin_cos"


def test_a_matmul_without_weights_has_the_name_of_its_operation() -> None:
    assert name_of(lambda m, x, y: x @ y, numbers(3, 4), numbers(4, 5)) == "matmul"


def test_a_stored_weight_gives_its_name_through_decoding_and_views() -> None:
    stored = torch.zeros(6, 34, dtype=torch.uint8)
    name = name_of(
        lambda m, x: x @ torch.ops.torchweld.dequantize(m.down, "Q8_0", 32).T, numbers(3, 32), down=stored
    )
    assert name == "down"


def test_attention_and_rope_are_named() -> None:
    def attend(m: Any, q: Tensor, k: Tensor) -> Tensor:
        result: Tensor = torch.ops.torchweld.attention(q.neg(), k, k, None, "none", 0, 0.5, 0.0)
        return result

    assert name_of(attend, numbers(1, 2, 3, 4), numbers(1, 2, 3, 4)) == "attention"


def test_long_names_are_cut_at_a_word() -> None:
    weights = {f"projection_number_{word}": numbers(4, 8) for word in ("one", "two", "three", "four", "five")}
    name = name_of(lambda m, x: tuple(F.linear(x, getattr(m, w)) for w in weights), numbers(3, 8), **weights)
    assert name == "projection_number_one_projection_number_two_and_more"
    assert len(name) <= MAX_NAME + len("_and_more")


def test_one_long_word_is_cut() -> None:
    weights = {"w" * 100: numbers(4, 8)}
    name = name_of(lambda m, x: F.linear(x, getattr(m, "w" * 100)), numbers(3, 8), **weights)
    assert name == "w" * (MAX_NAME + 9)
