"""The float64 reference for large linears: their weights are decoded and widened a few rows at a time.

The output head of Gemma 3 (262,144 x 640) takes 168 MB as stored and 1.3 GB in float64, beside 0.7 GB of float32 on the
way there. `Float64PieceInterpreter` never holds more than PIECE_ELEMENTS of a weight that only linears read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import Argument, Target

from torchweld.graph.float64 import Float64Interpreter, promote

PIECE_ELEMENTS: Final = 1 << 23
"""64 MB in float64."""
_LINEAR: Final = torch.ops.aten.linear.default
_DEQUANTIZE: Final = "torchweld::dequantize"


@dataclass(frozen=True)
class _Stored:
    """A weight that was not decoded: what `decode` was to be called with."""

    decode: Any
    data: Tensor
    arguments: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], int(self.arguments[1])

    def rows(self, start: int, end: int) -> Tensor:
        """float64 [end - start, columns]."""
        decoded: Tensor = self.decode(self.data[start:end], *self.arguments)
        return decoded.double()


class Float64PieceInterpreter(Float64Interpreter):
    """As Float64Interpreter, with the same result, for graphs whose linears have large weights."""

    def run_node(self, n: fx.Node) -> object:
        if _is_dequantize(n) and _only_weighs(n):
            data, *arguments = (self.env[arg] if isinstance(arg, fx.Node) else arg for arg in n.args)
            if isinstance(data, Tensor) and data.dim() == 2:
                return _Stored(n.target, data, tuple(arguments))
        if n.op == "get_attr" and _only_weighs(n):
            return self.fetch_attr(str(n.target))
        return super().run_node(n)

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]
    ) -> object:
        if target is _LINEAR and len(args) > 1 and not kwargs:
            x, weight, *rest = args
            bias = rest[0] if rest else None
            if isinstance(x, Tensor) and isinstance(weight, Tensor | _Stored) and len(weight.shape) == 2:
                return _linear(promote(x), weight, promote(bias) if isinstance(bias, Tensor) else None)
        return super().call_function(target, args, kwargs)


def _is_dequantize(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == _DEQUANTIZE


def _only_weighs(node: fx.Node) -> bool:
    """Is every reader a linear, and the value its weight and nothing else?"""
    return bool(node.users) and all(
        user.target is _LINEAR and [place for place, arg in enumerate(user.args) if arg is node] == [1]
        for user in node.users
    )


def _linear(x: Tensor, weight: Tensor | _Stored, bias: Tensor | None) -> Tensor:
    """float64 [..., K] x [N, K] -> float64 [..., N]."""
    count, columns = weight.shape
    step = max(1, PIECE_ELEMENTS // max(1, columns))
    out = x.new_empty(*x.shape[:-1], count)
    for start in range(0, count, step):
        end = min(start + step, count)
        rows = weight.rows(start, end) if isinstance(weight, _Stored) else promote(weight[start:end])
        out[..., start:end] = F.linear(x, rows, None if bias is None else bias[start:end])
    return out
