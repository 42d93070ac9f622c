"""Join a producer and its consumer in one kernel, so that the value between them stays in registers.

before:  h = linear(x, w);  y = silu(h);  z = y + r
after:   one kernel that stores z; h and y are never written (a value with other readers is still stored)
why:     every value between kernels is written and read once, and every kernel is launched once
legal:   both have kernels; no other group stands between them; at most one of them is built around a matmul or an
         attention; the consumer is not a concatenation; the pair has a kernel; it pays
source:  vertical fusion, survey of LLM inference, section on kernel fusion; Inductor's can_fuse_vertical
"""

from __future__ import annotations

from collections.abc import Iterator

from torchweld.graph.fusion import Move
from torchweld.graph.groups import GroupGraph
from torchweld.graph.rewrite import Exactness, Refusal
from torchweld.passes.fusion_shapes import has_anchor, selects_from, writes_side_by_side

NAME = "fuse_vertical"
EXACTNESS: Exactness = "reassoc"


def find(groups: GroupGraph, around: int | None = None) -> Iterator[Move]:
    """Every edge of the group graph."""
    if around is None:
        yield from groups.dag.edges
        return
    for parent in list(groups.dag.predecessors(around)):
        yield (parent, around)
    for child in list(groups.dag.successors(around)):
        yield (around, child)


def check(groups: GroupGraph, move: Move) -> Refusal | None:
    """One line per clause of `legal` that is this pass's own."""
    producer, consumer = (groups.groups[member] for member in move)
    if has_anchor(producer) and has_anchor(consumer):
        return Refusal("two anchors: input or output fusion joins those", consumer.nodes[0])
    if writes_side_by_side(consumer):
        return Refusal("the consumer is a concatenation: output fusion joins its writers", consumer.nodes[-1])
    return None


def rank(groups: GroupGraph, move: Move) -> int:
    """Work after a matmul before work in front of one, which is done again for every tile of columns; and before a
    selection is joined with the work that it selects from, which then no longer could be joined with the matmul."""
    producer, consumer = (groups.groups[member] for member in move)
    return 1 if has_anchor(consumer) or selects_from(consumer, producer) else 0
