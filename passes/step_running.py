"""What cumulative sums, products, log-sum-exps, maxima and minima become in a step: the value at the last row.

before:  y = cumsum(x)                            values, places = cummax(x)
after:   y = cached_running(kept, x, past, path)  values = cached_running(kept, x, past, path)
         kept = append_rows(kept, y, past)        places = cached_running(kept_places, positions where x = values, ...)
why:     a token then costs one addition instead of S
legal:   along the sequence alone (graph/sequence_scans.py)
source:  graph/ops/cached_running.py; kept by position, so that rollback and trees need nothing more

Sums, products and log-sum-exps of float32 are kept in float64 and those of 16-bit values in float32, as torch's own
kernels do on the CPU: a thousand tokens of a scan in log space would else lose digits.  Maxima keep the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import aten, axis_argument, rank_of, shape_of, tensor_of
from torchweld.graph.ops import cached_running as cached_running_op
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_scans import RUNNING, part_users, values_dtype
from torchweld.passes.step_carried import LAST, CarriedScope, CarriedState, count_features, name_of
from torchweld.passes.step_copy import Stand

CACHED_RUNNING: Final = torch.ops.torchweld.cached_running.default
NAMES: Final = {
    "sum": "cumulative sum", "product": "cumulative product", "logsumexp": "cumulative log-sum-exp",
    "maximum": "cumulative maximum", "minimum": "cumulative minimum",
}  # fmt: skip
"""How states are called, by the kind of cached_running."""
# Importing it is what registers the op.
OPERATOR_FILES: Final = (cached_running_op.__name__,)


def describe_running(found: SequenceAnalysis, node: fx.Node) -> tuple[CarriedState, ...]:
    """The value so far; for a maximum whose place is read, that too."""
    source: Any = node.args[0]
    axis, kind = found.along[node].axis, RUNNING[node.target]
    others = [size for place, size in enumerate(shape_of(source)) if place != axis]
    features, dtype = count_features(others, found.batch), _kept_dtype(kind, values_dtype(node))
    word = NAMES[kind].removeprefix("cumulative ")
    states = [CarriedState(NAMES[kind], LAST, features, dtype, f"the {word} so far, in {name_of(dtype)}")]
    if part_users(node, 1):
        reach = f"the position of the {word} so far"
        states.append(CarriedState(NAMES[kind], LAST, features, torch.int64, reach))
    return tuple(states)


def _kept_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values are carried, for results of `dtype`."""
    if kind in ("maximum", "minimum"):
        return dtype
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


@dataclass
class RunningWriter:
    """Writes what stands for running values."""

    scope: CarriedScope
    parts: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def stands(self, node: fx.Node) -> dict[fx.Node, Stand]:
        """What stands for a running value, and for the pieces of a maximum and its place."""
        found = {node: Stand(tuple(node.all_input_nodes), partial(self._write, node))}
        for part in (0, 1):
            for user in part_users(node, part):
                found[user] = Stand((node,), partial(self._part, node, part))
        return found

    def _part(self, node: fx.Node, part: int) -> fx.Node:
        return self.parts[node][part]

    def _write(self, node: fx.Node) -> fx.Node:
        make, inputs = partial(self.scope.rows.make, like=node), self.scope.inputs
        caches = self.scope.caches[node]
        source: fx.Node = self.scope.rows.known[node.args[0]]  # type: ignore[index]
        axis = axis_argument(node, 1, "dim", rank_of(source))
        order = [axis, *(place for place in range(rank_of(source)) if place != axis)]
        others = [int(size) for place, size in enumerate(tensor_of(source).shape) if place != axis]
        dtype, features = values_dtype(node), int(tensor_of(caches[0]).shape[3])
        value = make(aten.permute.default, source, order)
        value = self.scope.cast(node, value, dtype)  # as cumsum does before it adds
        value = self.scope.cast(node, value, tensor_of(caches[0]).dtype)
        new = make(aten.reshape.default, value, [inputs.batch, 1, inputs.new, features])
        kind = RUNNING[node.target]
        kept = [make(CACHED_RUNNING, caches[0], new, inputs.past, None, kind)]
        if len(caches) > 1:
            kept.append(self._places(node, new, kept[0]))
        self.scope.append(node, kept)
        back = [order.index(place) for place in range(len(order))]
        results = [make(aten.reshape.default, part, [inputs.length, *others]) for part in kept]
        results = [make(aten.permute.default, result, back) for result in results]
        results[0] = self.scope.cast(node, results[0], dtype)
        self.parts[node] = results
        return results[0]

    def _places(self, node: fx.Node, new: fx.Node, values: fx.Node) -> fx.Node:
        """The positions of the extremes, [B, 1, T, F]: the last position whose row equals the value, or is NaN."""
        make, inputs = partial(self.scope.rows.make, like=node), self.scope.inputs
        equal, is_nan = make(aten.eq.Tensor, new, values), make(aten.ne.Tensor, new, new)
        positions = make(aten.reshape.default, inputs.positions, [inputs.batch, 1, inputs.new, 1])
        taken = make(aten.where.ScalarOther, make(aten.logical_or.default, equal, is_nan), positions, -1)
        return make(CACHED_RUNNING, self.scope.caches[node][1], taken, inputs.past, None, "maximum")
