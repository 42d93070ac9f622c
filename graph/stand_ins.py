"""Stored weights that are not decoded whole: a tensor without memory stands for each, and `linear` knows better.

A captured graph decodes a weight, then multiplies by it: in float32 an output head of 262,144 rows is 671 MB. While
a mode of this kind is active, `torchweld::dequantize` of a large matrix gives a stand-in; what a product with it costs
is for the mode to say; whatever else reads a stand-in gets the whole weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchweld.graph.ops.dequantize import dequantize

_LINEARS: Final = (F.linear, torch.ops.aten.linear.default)
_DECODE: Final = torch.ops.torchweld.dequantize.default
Held = TypeVar("Held")


class StandIns(TorchFunctionMode, Generic[Held]):
    """`hold` says what is kept of a weight, `product` and `whole` make of it what is asked for.

    used: whether any weight had a stand-in.
    """

    def __init__(self) -> None:
        super().__init__()
        # By identity of the tensor that stands for the weight, which must live as long.
        self._held: dict[int, tuple[Tensor, Held]] = {}
        # By place in memory, so the bytes must live as long too.
        self._known: dict[tuple[int, str, int, int], tuple[Tensor, Tensor]] = {}

    @property
    def used(self) -> bool:
        """Did any weight have a stand-in?"""
        return bool(self._held)

    @abstractmethod
    def is_large(self, rows: int, columns: int) -> bool:
        """Does a weight of this shape get a stand-in?"""

    @abstractmethod
    def hold(self, data: Tensor, format_: str, columns: int) -> Held:
        """What is kept of the stored rows."""

    @abstractmethod
    def product(self, x: Tensor, held: Held, rows: int) -> Tensor:
        """[..., K] -> [..., rows]: `linear` without a bias."""

    @abstractmethod
    def whole(self, held: Held, rows: int) -> Tensor:
        """The weight, float32 [rows, K]."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The call of a torch function, with stand-ins for the weights that it decodes or reads."""
        named = dict(kwargs or {})
        if func is _DECODE and not named and isinstance(args[0], Tensor) and args[0].dim() == 2:
            if self.is_large(args[0].shape[0], args[2]):
                return self._stand_in(*args)
        if not self._reads_stand_in((*args, *named.values())):
            return func(*args, **named)
        if func in _LINEARS and len(args) > 1 and id(args[1]) in self._held:
            x, weight, bias = (*args, named.get("bias"))[:3]
            if id(x) not in self._held:
                result = self.product(x, self._held[id(weight)][1], weight.shape[0])
                return result if bias is None else result + bias
        whole_args, whole_named = pytree.tree_map_only(Tensor, self._whole, (args, named))
        return func(*whole_args, **whole_named)

    def _reads_stand_in(self, values: Sequence[object]) -> bool:
        """Does a call with these arguments read one of them, perhaps as one of several in a list?"""
        return any(
            id(value) in self._held or (isinstance(value, list | tuple) and self._reads_stand_in(value))
            for value in values
        )

    def _stand_in(self, data: Tensor, format_: str, columns: int) -> Tensor:
        """A tensor of the weight's shape without memory of its own; the same one for the same bytes."""
        key = (data.data_ptr(), format_, columns, data.shape[0])
        if key not in self._known:
            stand_in = torch.full((), torch.nan).expand(data.shape[0], columns)
            self._held[id(stand_in)] = stand_in, self.hold(data, format_, columns)
            self._known[key] = data, stand_in
        return self._known[key][1]

    def _whole(self, tensor: Tensor) -> Tensor:
        """The weight that a tensor stands for; any other tensor itself."""
        if id(tensor) not in self._held:
            return tensor
        return self.whole(self._held[id(tensor)][1], tensor.shape[0])


class DecodedInPieces(StandIns[tuple[Tensor, str, int]]):
    """While active, `linear` with a large stored weight decodes and multiplies some of its rows at a time.

    It computes what the graph says, in less memory; sums may be rounded in another order.
    done_with: told of stored rows behind each product with them.
    """

    PIECE: Final = 4 << 20
    """Values of a weight that are decoded at a time, and above which it is large."""

    def __init__(self, done_with: Callable[[Tensor], object] = lambda rows: None) -> None:
        super().__init__()
        self._done_with = done_with

    def is_large(self, rows: int, columns: int) -> bool:
        """A weight of more than one piece."""
        return rows * columns > self.PIECE

    def hold(self, data: Tensor, format_: str, columns: int) -> tuple[Tensor, str, int]:
        """The stored rows themselves."""
        return data, format_, columns

    def product(self, x: Tensor, held: tuple[Tensor, str, int], rows: int) -> Tensor:
        """[..., K] -> [..., rows]."""
        data, format_, columns = held
        result = x.new_empty((*x.shape[:-1], rows))
        step = max(1, self.PIECE // columns)
        for first in range(0, rows, step):
            stored = data[first : first + step]
            result[..., first : first + step] = F.linear(x, dequantize(stored, format_, columns))
            self._done_with(stored)
        return result

    def whole(self, held: tuple[Tensor, str, int], rows: int) -> Tensor:
        """All rows, decoded."""
        decoded: Tensor = dequantize(*held)
        return decoded
