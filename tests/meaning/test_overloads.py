"""Overloads that torch's samples do not reach, each called as captured graphs call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from tests.meaning.single_operations import run_unfused
from tests.pipeline.stages import traced

aten = torch.ops.aten
own = torch.ops.torchweld
X = torch.linspace(-3, 3, 24).reshape(2, 3, 4)
Y = torch.linspace(0.5, 2, 4)
N = torch.arange(-6, 6).reshape(3, 4)
B = N > 1


def _scalars() -> dict[object, tuple[object, ...]]:
    """Overloads with a number as the second operand."""
    table: dict[object, tuple[object, ...]] = {}
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        table[getattr(aten, name).Scalar] = (N, 1)
    for name in ("and", "or", "xor"):
        for prefix, overload, other in (("bitwise_", "Tensor", N.flip(0)), ("bitwise_", "Scalar", 3)):
            table[getattr(getattr(aten, f"{prefix}{name}"), overload)] = (N, other)
        table[getattr(aten, f"__{name}__").Tensor] = (B, B.flip(1))
        table[getattr(aten, f"__{name}__").Scalar] = (N, 5)
    for packet in (
        aten.add,
        aten.sub,
        aten.mul,
        aten.div,
        aten.true_divide,
        aten.remainder,
        aten.fmod,
        aten.rsub,
    ):
        table[packet.Scalar] = (X, 1.5)
    return table


#: operation -> its arguments; a tensor becomes an input of the program
CALLS: Mapping[object, tuple[object, ...]] = MappingProxyType(
    {
        **_scalars(),
        aten.div.Scalar_mode: (N, 4),
        aten.floor_divide.Scalar: (N, 4),
        aten.pow.Tensor_Scalar: (X, 2),
        aten.pow.Scalar: (2.0, X),
        aten.bitwise_not.default: (N,),
        aten.lerp.Tensor: (X, X.flip(0), Y),
        aten.where.ScalarSelf: (B, 1.0, Y),
        aten.where.ScalarOther: (B, Y, 2.0),
        aten.where.Scalar: (B, 1.0, 2.0),
        aten.clamp.default: (X, -1.0, 1.0),
        aten.clamp_max.default: (X, 0.5),
        aten._to_copy.default: (X,),
        aten.to.dtype_layout: (X,),
        aten.to.other: (X, N),
        aten.type_as.default: (N, X),
        aten.contiguous.default: (X.mT,),
        aten.alias.default: (X,),
        aten.detach.default: (X,),
        aten.detach_.default: (torch.ones(3),),
        aten.masked_fill.Tensor: (X, B, torch.tensor(2.0)),
        aten.std.dim: (X, [1], False),
        aten.var.dim: (X, [0, 2], True, True),
        aten._unsafe_view.default: (X, [4, 6]),
        aten.view.dtype: (N, torch.int64),
        aten.split.sizes: (X, [1, 2], 1),
        aten.concat.default: ([X, X.flip(0)], -1),
        aten.arange.default: (7,),
        aten.arange.start: (-2, 7),
        aten.any.dims: (B, [0, 1]),
        aten.all.dims: (B, [0], True),
        aten._softmax.default: (X, 1, False),
        aten._log_softmax.default: (X, -1, False),
        own.rope.default: (X, Y[:2].expand(3, 2), Y[2:].expand(3, 2), True),
        own.attention.default: (X[None], X[None], X[None].flip(2), None, "window", 2, 0.5, 3.0),
        own.dequantize.default: (torch.arange(68, dtype=torch.uint8).reshape(2, 34).fill_(3), "Q8_0", 32),
    }
)
KEYWORDS: Mapping[object, Mapping[str, object]] = MappingProxyType(
    {
        aten.div.Scalar_mode: {"rounding_mode": "trunc"},
        aten._to_copy.default: {"dtype": torch.bfloat16},
        aten.to.dtype_layout: {"dtype": torch.float16, "layout": torch.strided},
    }
)
"""Keyword arguments of the calls above."""


def call_of(target: object) -> tuple[Callable[..., object], list[Tensor]]:
    """A function of tensors that makes the call, and the tensors."""
    arguments, keywords = CALLS[target], KEYWORDS.get(target, {})
    flat, spec = torch.utils._pytree.tree_flatten(arguments)
    places = [place for place, leaf in enumerate(flat) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> object:
        filled = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        assert callable(target)
        return target(*torch.utils._pytree.tree_unflatten(filled, spec), **keywords)

    return call, [flat[place] for place in places]


@pytest.mark.parametrize("target", CALLS, ids=str)
def test_overload(target: object) -> None:
    call, inputs = call_of(target)
    program = traced(call, inputs)
    assert any(node.target is target for node in program.graph.nodes), f"{target} was decomposed by tracing"
    assert run_unfused(program, inputs, str(target)) == []
