"""What causal convolutions become in a step, rows kept in a ring; and which file has the rest of what is carried.

before:  y = causal_convolution(x, w, b)
after:   held = append_rows(inputs, x, past);  taps = cached_rows(held, past, positions, path)
         y = sum over taps of taps * w, plus b
why:     a token then costs one row of the convolution
legal:   a convolution reads (K - 1) * dilation rows back: the ring holds them for every row of a step
source:  the conv state of Mamba and LFM2 caches; kept by position here, so that rollback and trees need nothing more

The convolution is a matmul over (tap, channel), or a sum over taps per channel where every channel is a group: both
give a row the same bits whatever the number of rows. Cumulative sums and their kin are in step_running.py, scans in
step_scan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import aten, shape_of, tensor_of
from torchweld.graph.ops import cached_rows as cached_rows_op
from torchweld.graph.ops.scan import Scan
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_states import CONVOLUTION
from torchweld.passes.step_carried import APPEND, CarriedScope, CarriedState
from torchweld.passes.step_copy import Stand
from torchweld.passes.step_running import RunningWriter, describe_running
from torchweld.passes.step_scan import ScanWriter, describe_scan

CACHED_ROWS: Final = torch.ops.torchweld.cached_rows.default
FEW_TAPS: Final = 8
ROWS_FIRST: Final = [0, 2, 1]  # [1, channels, N] <-> [1, N, channels]
# Importing it is what registers the op.
OPERATOR_FILES: Final = (cached_rows_op.__name__,)


def describe_carried(found: SequenceAnalysis, node: fx.Node) -> tuple[CarriedState, ...]:
    """The states of a node of `found.carried`, one per cache."""
    if isinstance(node.target, Scan):
        return describe_scan(found, node)
    return (_describe(node),) if node.target is CONVOLUTION else describe_running(found, node)


def stands_of_carried(scope: CarriedScope, found: SequenceAnalysis) -> dict[fx.Node, Stand]:
    """What stands for all of `found.carried`, and for the pieces of those with several results."""
    convolutions, running, scans = ConvolutionWriter(scope), RunningWriter(scope), ScanWriter(scope)
    stands: dict[fx.Node, Stand] = {}
    for node in found.carried:
        if isinstance(node.target, Scan):
            stands |= scans.stands(node)
        else:
            stands |= (convolutions if node.target is CONVOLUTION else running).stands(node)
    return stands


def _describe(node: fx.Node) -> CarriedState:
    source: Any = node.args[0]
    taps, dilation = _taps(node), int(node.args[3])  # type: ignore[arg-type]
    back = (taps - 1) * dilation
    reach = f"a kernel of {taps} behind {back} zeros" + (f", dilation {dilation}" if dilation > 1 else "")
    channels = int(shape_of(source)[1])
    return CarriedState("convolution", back + 1, channels, tensor_of(source).dtype, reach)


def _taps(node: fx.Node) -> int:
    return int(shape_of(node.args[1])[2])  # type: ignore[arg-type]


@dataclass
class ConvolutionWriter:
    """Writes what stands for causal convolutions."""

    scope: CarriedScope

    def stands(self, node: fx.Node) -> dict[fx.Node, Stand]:
        """What stands for a convolution."""
        return {node: Stand(tuple(node.all_input_nodes), partial(self._write, node))}

    def _write(self, node: fx.Node) -> fx.Node:
        make = partial(self.scope.rows.make, like=node)
        inputs = self.scope.inputs
        known: Any = fx.node.map_arg(node.args, self.scope.rows.known.__getitem__)
        source, weight, bias, dilation, groups = known
        batch_of_one: Any = make(aten.permute.default, source, ROWS_FIRST)
        channels = int(tensor_of(batch_of_one).shape[2])
        new = make(aten.reshape.default, batch_of_one, [inputs.batch, 1, inputs.new, channels])
        held = make(APPEND, self.scope.caches[node][0], new, inputs.past)
        self.scope.appended[node] = (held,)
        taps = _taps(node)
        read = make(CACHED_ROWS, held, inputs.past, inputs.positions, None, taps, dilation)
        flat = make(aten.reshape.default, read, [1, inputs.length, taps, channels])
        mixed = self._mix_taps(node, flat, weight, groups)
        if bias is not None:
            mixed = make(aten.add.Tensor, mixed, bias)
        return make(aten.permute.default, mixed, ROWS_FIRST)

    def _mix_taps(self, node: fx.Node, flat: fx.Node, weight: fx.Node, groups: int) -> fx.Node:
        """[1, N, taps, groups * I] and weight [O, I, taps] -> [1, N, O]."""
        make, length = partial(self.scope.rows.make, like=node), self.scope.inputs.length
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
        make = partial(self.scope.rows.make, like=node)
        if taps > FEW_TAPS:
            return make(aten.sum.dim_IntList, make(aten.mul.Tensor, wide, table), [2])
        total: fx.Node | None = None
        for tap in range(taps):
            line, factor = make(aten.select.int, wide, 2, tap), make(aten.select.int, table, 0, tap)
            product = make(aten.mul.Tensor, line, factor)
            total = product if total is None else make(aten.add.Tensor, total, product)
        assert total is not None
        return total
