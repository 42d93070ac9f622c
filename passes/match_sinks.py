"""Attention sinks: one more score per query head, joined to the scores before the softmax and cut off behind it.

    softmax(cat([scores, sinks], -1))[..., :-1] @ value        sinks [heads], seen as [batch, heads, queries, 1]

The sink may stand on either side of the scores.  Source: gpt-oss; Xiao et al., StreamingLLM (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    dtype_of,
    is_call,
    is_last_axis,
    is_tensor,
    rank_of,
    shape_of,
)
from torchweld.graph.rewrite import Refusal


@dataclass(frozen=True)
class Sinks:
    """`node`: the sinks, as many numbers as there are query heads, in their order.  `first`: they stand in front."""

    node: fx.Node
    first: bool


def read_sinks(joined: fx.Node) -> tuple[fx.Node, Sinks] | Refusal:
    """(scores, sinks) of the concatenation of both."""
    parts: Any = joined.args[0]
    if (
        len(parts) != 2
        or not all(map(is_tensor, parts))
        or not is_last_axis(joined, argument(joined, 1, "dim", 0))
    ):
        return Refusal("the scores are concatenated with something that is no sink", joined)
    narrow = [shape_of(part)[-1] == 1 for part in parts]
    if sum(narrow) == 2:  # one key and one sink: the scores are what a product leads to
        narrow = [bare_sinks(part) is not None for part in parts]
    if sum(narrow) != 1:
        return Refusal("the scores are concatenated with something that is no sink", joined)
    first = narrow[0]
    sink, scores = parts if first else reversed(parts)
    node = bare_sinks(sink)
    if node is None:
        return Refusal("the sinks are not one number per query head", sink)
    return scores, Sinks(node, first)


def bare_sinks(node: fx.Node) -> fx.Node | None:
    """The numbers per head behind [batch, (groups of) heads, queries, 1]; None where they differ between queries."""
    heads = prod(shape_of(node)[1:-2])
    while is_call(node, aten.expand.default, aten._to_copy.default) and is_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    if rank_of(node) not in (4, 5) or not dtype_of(node).is_floating_point or not isinstance(heads, int):
        return None
    batch, *groups, queries, _ = shape_of(node)
    if (batch, queries, prod(groups)) != (1, 1, heads):
        return None
    below = node.args[0] if is_call(node, aten.reshape.default) else None
    return below if isinstance(below, fx.Node) and shape_of(below) == (heads,) else node


def check_cut(cut: fx.Node | None, scores: fx.Node, sinks: Sinks | None) -> Refusal | None:
    """What is cut off the weights must be the sink, and nothing else."""
    if cut is None:
        return None if sinks is None else Refusal("the weight of the sink is not cut off", scores)
    start, step = argument(cut, 2, "start"), argument(cut, 4, "step", 1)
    is_last = argument(cut, 1, "dim", 0) in (-1, rank_of(cut) - 1)
    if sinks is None or not is_last or step != 1 or shape_of(cut)[-1] != shape_of(scores)[-1]:
        return Refusal("a part of the weights is cut off that is no sink", cut)
    if (start or 0) != int(sinks.first):
        return Refusal("a part of the weights is cut off that is no sink", cut)
    return None
