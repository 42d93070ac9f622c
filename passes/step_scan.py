"""What a user's scan over the sequence becomes in a step: the carry after the last row, and the body for new rows.

before:  results = scan(initial, rows, shared)                  y, (h, c) = torch scan of an LSTM cell, say
after:   carries, results = cached_scan(kept, rows, initial, shared, past, path);  kept = append_rows(kept, carries)
why:     a token then costs one run of the body instead of S
legal:   rows are the sequence; initial and shared do not depend on tokens (graph/sequence_scans.py)
source:  torch._higher_order_ops.scan and associative_scan; graph/ops/scan.py

An associative scan needs no rule of its own: combining the kept element with the next row is its definition, and the
tree of pairs that torch builds is one way to reassociate it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import fx

from torchweld.graph.match import aten, shape_of, tensor_of
from torchweld.graph.ops.scan import CachedScan, Scan
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_scans import part_users
from torchweld.passes.step_carried import LAST, CarriedScope, CarriedState, count_features, name_of
from torchweld.passes.step_copy import Stand


def describe_scan(found: SequenceAnalysis, node: fx.Node) -> tuple[CarriedState, ...]:
    """One state per carry."""
    initial, rows, _ = node.args
    likes: Any = initial or rows
    kind = "scan" if initial else "associative scan"
    what = "carry" if initial else "element"
    states = []
    for number, like in enumerate(likes):
        sizes = shape_of(like)[0 if initial else 1 :]
        dtype = tensor_of(like).dtype
        which = f" {number + 1} of {len(likes)}" if len(likes) > 1 else ""
        reach = f"{what}{which} after the last row, in {name_of(dtype)}"
        states.append(CarriedState(kind, LAST, count_features(sizes, found.batch), dtype, reach))
    return tuple(states)


@dataclass
class ScanWriter:
    """Writes what stands for scans."""

    scope: CarriedScope
    parts: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def stands(self, node: fx.Node) -> dict[fx.Node, Stand]:
        """What stands for a scan, and for its results."""
        found = {node: Stand(tuple(node.all_input_nodes), partial(self._write, node))}
        for part in range(len(node.meta["val"])):
            for user in part_users(node, part):
                found[user] = Stand((node,), partial(self._part, node, part))
        return found

    def _part(self, node: fx.Node, part: int) -> fx.Node:
        return self.parts[node][part]

    def _write(self, node: fx.Node) -> fx.Node:
        make, inputs = partial(self.scope.rows.make, like=node), self.scope.inputs
        caches, scan = self.scope.caches[node], node.target
        assert isinstance(scan, Scan)
        known: Any = fx.node.map_arg(node.args, self.scope.rows.known.__getitem__)
        initial, rows, shared = known
        by_sequence = [
            make(aten.reshape.default, row, [inputs.batch, inputs.new, *map(int, tensor_of(row).shape[1:])])
            for row in rows
        ]
        held = make(
            CachedScan(scan), list(caches), by_sequence, list(initial), list(shared), inputs.past, None
        )
        parts = [make(operator.getitem, held, place) for place in range(len(held.meta["val"]))]
        self.scope.append(node, parts[: scan.carries])
        shapes = [tensor_of(like).shape for like in initial] or [tensor_of(row).shape[1:] for row in rows]
        states = [
            make(aten.reshape.default, parts[state], [inputs.length, *map(int, shapes[state])])
            for state in scan.states
        ]
        results = [
            make(aten.reshape.default, part, [inputs.length, *map(int, tensor_of(part).shape[2:])])
            for part in parts[scan.carries :]
        ]
        self.parts[node] = [*states, *results]
        return held
