"""What convolutions and cumulative sums become in a step: rows kept in a ring, as attention keeps keys and values.

before:  y = causal_convolution(x, w, b)                  y = cumsum(x)
after:   held = append_rows(inputs, x, past)              sums = cached_cumsum(kept, x, past, path)
         taps = cached_rows(held, past, positions, path)  kept = append_rows(kept, sums, past)
         y = sum over taps of taps * w, plus b            y = sums
why:     a token then costs one row of the convolution, and one addition of the sum
legal:   a convolution reads (K - 1) * dilation rows back, a sum one: the ring holds them for every row of a step
source:  the conv state of Mamba and LFM2 caches; kept by position here, so that rollback and trees need nothing more

The convolution is a matmul over (tap, channel), or a sum over taps per channel where every channel is a group: both
give a row the same bits whatever the number of rows. A sum keeps the running sum at every position, in float32 for
16-bit values, and adds one position after the other for the same reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import aten, axis_argument, rank_of, shape_of, tensor_of
from torchweld.graph.ops import cached_rows as cached_rows_op
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_states import CONVOLUTION
from torchweld.passes.step_copy import Stand, StepCopier
from torchweld.passes.step_inputs import StepInputs

APPEND: Final = torch.ops.torchweld.append_rows.default
CACHED_ROWS: Final = torch.ops.torchweld.cached_rows.default
CACHED_CUMSUM: Final = torch.ops.torchweld.cached_cumsum.default
FEW_TAPS: Final = 8
ROWS_FIRST: Final = [0, 2, 1]  # [1, channels, N] <-> [1, N, channels]
# Importing it is what registers the ops.
OPERATOR_FILES: Final = (cached_rows_op.__name__,)


@dataclass(frozen=True)
class CarriedState:
    """Rows that one convolution or cumulative sum keeps: [B, 1, C, features] of `dtype`, the last `window` of them.

    window counts the row that is computed, as that of an attention does.  reach: in words, what is read.
    """

    kind: str
    window: int
    features: int
    dtype: torch.dtype
    reach: str


def describe_carried(found: SequenceAnalysis, node: fx.Node) -> CarriedState:
    """The state of a node of `found.carried`."""
    source: Any = node.args[0]
    if node.target is CONVOLUTION:
        taps, dilation = _taps(node), int(node.args[3])  # type: ignore[arg-type]
        back = (taps - 1) * dilation
        reach = f"a kernel of {taps} behind {back} zeros" + (f", dilation {dilation}" if dilation > 1 else "")
        channels = int(shape_of(source)[1])
        return CarriedState("convolution", back + 1, channels, tensor_of(source).dtype, reach)
    axis = found.along[node].axis
    features = prod(1 if size == found.batch else int(size) for size in _others(source, axis))
    dtype = _sum_dtype(tensor_of(node).dtype)
    return CarriedState("cumulative sum", 2, features, dtype, f"the sum so far, in {_name(dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _taps(node: fx.Node) -> int:
    return int(shape_of(node.args[1])[2])  # type: ignore[arg-type]


def _others(source: fx.Node, axis: int) -> list[Any]:
    return [size for place, size in enumerate(shape_of(source)) if place != axis]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in, for results of `dtype`."""
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class CarriedWriter:
    """Writes what stands for carried nodes; `appended` takes their caches, by node."""

    rows: StepCopier
    inputs: StepInputs
    caches: dict[fx.Node, fx.Node]
    appended: dict[Any, tuple[fx.Node, ...]]

    def stand(self, node: fx.Node) -> Stand:
        """What stands for one of `found.carried`."""
        write = self._convolution if node.target is CONVOLUTION else self._cumsum
        return Stand(tuple(node.all_input_nodes), partial(write, node))

    def _convolution(self, node: fx.Node) -> fx.Node:
        make = partial(self.rows.make, like=node)
        inputs = self.inputs
        known: Any = fx.node.map_arg(node.args, self.rows.known.__getitem__)
        source, weight, bias, dilation, groups = known
        batch_of_one: Any = make(aten.permute.default, source, ROWS_FIRST)
        channels = int(tensor_of(batch_of_one).shape[2])
        new = make(aten.reshape.default, batch_of_one, [inputs.batch, 1, inputs.new, channels])
        held = make(APPEND, self.caches[node], new, inputs.past)
        self.appended[node] = (held,)
        taps = _taps(node)
        read = make(CACHED_ROWS, held, inputs.past, inputs.positions, None, taps, dilation)
        flat = make(aten.reshape.default, read, [1, inputs.length, taps, channels])
        mixed = self._mix_taps(node, flat, weight, groups)
        if bias is not None:
            mixed = make(aten.add.Tensor, mixed, bias)
        return make(aten.permute.default, mixed, ROWS_FIRST)

    def _mix_taps(self, node: fx.Node, flat: fx.Node, weight: fx.Node, groups: int) -> fx.Node:
        """[1, N, taps, groups * I] and weight [O, I, taps] -> [1, N, O]."""
        make, length = partial(self.rows.make, like=node), self.inputs.length
        out, per_group, taps = (int(size) for size in tensor_of(weight).shape)
        if groups == 1:
            table = make(aten.permute.default, weight, ROWS_FIRST)
            matrix = make(aten.reshape.default, table, [out, taps * per_group])
            lines = make(aten.reshape.default, flat, [1, length, taps * per_group])
            return make(aten.linear.default, lines, matrix)
        if per_group == 1:
            several = make(aten.reshape.default, weight, [groups, out // groups, taps])
            table = make(aten.permute.default, several, [2, 0, 1])
            wide = make(aten.reshape.default, flat, [1, length, taps, groups, 1])
            summed = self._sum_taps(node, wide, table, taps)
            return make(aten.reshape.default, summed, [1, length, out])
        apart = make(aten.reshape.default, flat, [length, taps, groups, per_group])
        lines = make(aten.permute.default, apart, [2, 0, 1, 3])
        lines = make(aten.reshape.default, lines, [groups, length, taps * per_group])
        several = make(aten.reshape.default, weight, [groups, out // groups, per_group, taps])
        matrices = make(aten.permute.default, several, [0, 3, 2, 1])
        matrices = make(aten.reshape.default, matrices, [groups, taps * per_group, out // groups])
        mixed = make(aten.permute.default, make(aten.bmm.default, lines, matrices), [1, 0, 2])
        return make(aten.reshape.default, mixed, [1, length, out])

    def _sum_taps(self, node: fx.Node, wide: fx.Node, table: fx.Node, taps: int) -> fx.Node:
        """sum over axis 2 of wide [1, N, taps, G, 1] * table [taps, G, O / G], spelled out where there are few taps:
        a kernel then runs over the channels, not over the taps."""
        make = partial(self.rows.make, like=node)
        if taps > FEW_TAPS:
            return make(aten.sum.dim_IntList, make(aten.mul.Tensor, wide, table), [2])
        total: fx.Node | None = None
        for tap in range(taps):
            line, factor = make(aten.select.int, wide, 2, tap), make(aten.select.int, table, 0, tap)
            product = make(aten.mul.Tensor, line, factor)
            total = product if total is None else make(aten.add.Tensor, total, product)
        assert total is not None
        return total

    def _cumsum(self, node: fx.Node) -> fx.Node:
        make, inputs = partial(self.rows.make, like=node), self.inputs
        source: fx.Node = self.rows.known[node.args[0]]  # type: ignore[index]
        axis = axis_argument(node, 1, "dim", rank_of(source))
        order = [axis, *(place for place in range(rank_of(source)) if place != axis)]
        others = [int(size) for place, size in enumerate(tensor_of(source).shape) if place != axis]
        value = make(aten.permute.default, source, order)
        value = self._cast(node, value, tensor_of(node).dtype)  # as cumsum does before it adds
        value = self._cast(node, value, tensor_of(self.caches[node]).dtype)
        new = make(aten.reshape.default, value, [inputs.batch, 1, inputs.new, prod(others)])
        sums = make(CACHED_CUMSUM, self.caches[node], new, inputs.past, None)
        self.appended[node] = (make(APPEND, self.caches[node], sums, inputs.past),)
        result = make(aten.reshape.default, sums, [inputs.length, *others])
        back = make(aten.permute.default, result, [order.index(place) for place in range(len(order))])
        return self._cast(node, back, tensor_of(node).dtype)

    def _cast(self, node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if tensor_of(value).dtype == dtype:
            return value
        return self.rows.make(aten._to_copy.default, value, like=node, dtype=dtype)
