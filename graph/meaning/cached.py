"""Rows that a convolution kept, by position, and running values: see graph/ops/cached_rows.py and cached_running.py."""

from __future__ import annotations

import torch
from torch import fx

from torchweld.graph.index import ONE, ZERO
from torchweld.graph.meaning.context import (
    Index,
    Meaning,
    Rule,
    Unsupported,
    compute_dtype,
    index_value,
    shape_of,
    tensor_of,
)
from torchweld.graph.ops import cached_rows as _rows_op  # noqa: F401  registers the op
from torchweld.graph.ops import cached_running as _running_op  # noqa: F401  registers the op
from torchweld.graph.terms import Guard, Term, cast, const, op


def _cached_rows(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """The row `back` positions before a new row, found through its slot; 0 in front of position 0."""
    cache, past, positions, path, taps, dilation = node.args
    if not isinstance(cache, fx.Node) or not isinstance(taps, int) or not isinstance(dilation, int):
        raise Unsupported(f"{node.name}: expected a cache, and numbers of taps and dilation")
    sequence, row, tap, feature = index
    back = index_value((taps - ONE - tap) * dilation)
    wanted = op("sub", cast(meaning.value(positions, (sequence, row)), torch.int64), back)
    zero = const(0, torch.int64)
    capacity = shape_of(cache)[2]
    place = wanted
    if isinstance(path, fx.Node):
        start = cast(meaning.value(past, (sequence,)), torch.int64)
        new = op("sub", wanted, start)
        rows = shape_of(path)[2]
        depth = op("min", op("max", new, zero), index_value(rows - ONE))
        ancestor = meaning.value(path, (sequence, row, meaning.declare_indirect(depth, rows)))
        place = op("where", op("lt", new, zero), wanted, op("add", start, cast(ancestor, torch.int64)))
    # mod is never negative: the slot exists also for positions in front of 0, whose value is not taken.
    slot = meaning.declare_indirect(op("mod", place, index_value(capacity)), capacity)
    dtype = compute_dtype(tensor_of(node).dtype)
    value = cast(meaning.value(cache, (sequence, ZERO, slot, feature)), dtype)
    return Guard(dtype, op("ge", wanted, zero), value, const(0, dtype))


def _cached_running(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """Reassociating a sum would give one row and many rows other bits, so no Fold may stand for it."""
    raise Unsupported(
        "a running value takes in one new row after the other, for which kernels have no loop: it runs eagerly"
    )


CACHED: dict[object, Rule] = {
    torch.ops.torchweld.cached_rows.default: Rule("pointwise", _cached_rows),
    torch.ops.torchweld.cached_running.default: Rule("reduce", _cached_running),
}
