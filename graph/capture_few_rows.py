"""Stored weights that stand for themselves with few of their rows, while a capture is checked.

What a check asks is whether two ways of computing agree at some sizes, and they have to agree for any weights. So a
stored weight of many rows is replaced on both sides by one that repeats its first rows: only those are decoded, and a
linear multiplies by those and repeats its columns. A check of a model of 270 million weights would otherwise decode
all of them four times, and hold a whole output head in float32 at a time.

Whoever finds a difference here looks again with the true weights: a call that this mode does not see on one side only
(inside of a function that torch overrides as a whole) makes the sides differ though the graph is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchweld.graph.ops.dequantize import dequantize

ROWS: Final = 61
"""A prime that no head size, group or block is a multiple of: a cut at a wrong place shows."""
_LINEARS: Final = (F.linear, torch.ops.aten.linear.default)
_DECODE: Final = torch.ops.torchweld.dequantize.default


class FewRows(TorchFunctionMode):
    """While active, `torchweld::dequantize` of a matrix gives the weight whose row i is row i % ROWS of it.

    used: whether that happened. Products with such a weight by `linear` cost ROWS columns; whatever else reads it gets
    all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        # By identity of the tensor that stands for the weight, which must live as long; the second holds the rows.
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        # By place in memory, so the bytes must live as long too.
        self._known: dict[tuple[int, str, int, int], tuple[Tensor, Tensor]] = {}

    @property
    def used(self) -> bool:
        """Did any weight have a stand-in?"""
        return bool(self._rows)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The call of a torch function, with stand-ins for the weights that it decodes or reads."""
        named = dict(kwargs or {})
        if func is _DECODE and not named and self._is_large(args[0]):
            return self._stand_in(*args)
        if not self._reads_stand_in((*args, *named.values())):
            return func(*args, **named)
        if func in _LINEARS and len(args) > 1 and id(args[1]) in self._rows:
            x, weight, bias = (*args, named.get("bias"))[:3]
            if id(x) not in self._rows:
                return self._linear(x, weight, bias)
        whole_args, whole_named = pytree.tree_map_only(Tensor, self._whole, (args, named))
        return func(*whole_args, **whole_named)

    def _reads_stand_in(self, values: Sequence[object]) -> bool:
        """Does a call with these arguments read one of them, perhaps as one of several in a list?"""
        return any(
            id(value) in self._rows or (isinstance(value, list | tuple) and self._reads_stand_in(value))
            for value in values
        )

    @staticmethod
    def _is_large(data: object) -> bool:
        return isinstance(data, Tensor) and data.dim() == 2 and data.shape[0] > ROWS

    def _stand_in(self, data: Tensor, format_: str, columns: int) -> Tensor:
        """A tensor of the weight's shape without memory of its own; the same one for the same bytes."""
        key = (data.data_ptr(), format_, columns, data.shape[0])
        if key not in self._known:
            rows = dequantize(data[:ROWS], format_, columns)
            stand_in = torch.full((), torch.nan).expand(data.shape[0], columns)
            self._known[key] = data, stand_in
            self._rows[id(stand_in)] = stand_in, rows
        return self._known[key][1]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., K] -> [..., N], where rows of the weight [N, K] repeat."""
        product = F.linear(x, self._rows[id(weight)][1])
        whole = product.index_select(-1, self._numbers(weight))
        return whole if bias is None else whole + bias

    def _whole(self, tensor: Tensor) -> Tensor:
        """The weight that a tensor stands for; any other tensor itself."""
        if id(tensor) not in self._rows:
            return tensor
        return self._rows[id(tensor)][1].index_select(0, self._numbers(tensor))

    @staticmethod
    def _numbers(weight: Tensor) -> Tensor:
        """The row that stands for each row of a weight: int64 [N]."""
        return torch.arange(weight.shape[0], device=weight.device) % ROWS
