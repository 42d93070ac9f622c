"""Join groups whose results are used together, so that the common result is written once, in place.

before:  a = linear(x, w);  b = linear(y, v);  z = cat([a, b], -1)         or   z = a + b
after:   one kernel whose loops write their slices of z               or   one loop with two accumulators
why:     the pieces are never written on their own and copied; one launch
legal:   the consumer writes pieces side by side, or both are built around a matmul; both have kernels; no other group
         stands between them; the pair has a kernel; it pays
source:  output fusion, survey of LLM inference, section on kernel fusion
"""

from __future__ import annotations

from collections.abc import Iterator

from torchweld.graph.fusion import Move
from torchweld.graph.groups import GroupGraph
from torchweld.graph.rewrite import Exactness, Refusal
from torchweld.passes.fusion_shapes import has_anchor, writes_side_by_side

NAME = "fuse_output"
EXACTNESS: Exactness = "reassoc"


def find(groups: GroupGraph, around: int | None = None) -> Iterator[Move]:
    """A group that ends in a concatenation or in a sum of matmuls, with each of its producers."""
    consumers = groups.dag.nodes if around is None else [around, *groups.dag.successors(around)]
    for consumer in list(consumers):
        group = groups.groups[consumer]
        if writes_side_by_side(group) or has_anchor(group):
            for producer in list(groups.dag.predecessors(consumer)):
                yield (producer, consumer)


def check(groups: GroupGraph, move: Move) -> Refusal | None:
    """One line per clause of `legal` that is this pass's own."""
    producer, consumer = (groups.groups[member] for member in move)
    if writes_side_by_side(consumer):
        return None
    if not (has_anchor(producer) and has_anchor(consumer)):
        return Refusal(
            "only one of them is built around a matmul: vertical fusion joins those", consumer.nodes[0]
        )
    return None


def rank(groups: GroupGraph, move: Move) -> int:
    """All moves are of one rank: the gain decides."""
    return 0
