"""Join groups that read the same tensor, so that it is read once.

before:  q = linear(x, wq);  k = linear(x, wk);  v = linear(x, wv)
after:   one kernel with three loops of their own grid; x comes from memory once, one launch replaces three
         (gate and up, whose results meet, share one loop and two accumulators)
why:     x is read once; matters most for few rows; weights keep their own stored formats, nothing is concatenated
legal:   both have kernels; they read a common tensor that is computed or given (weights are read by one layer only);
         neither waits for the other through a third group; the pair has a kernel; it pays
source:  input fusion, survey of LLM inference, section on kernel fusion
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from torchweld.graph.fusion import Move
from torchweld.graph.groups import GroupGraph
from torchweld.graph.rewrite import Exactness, Refusal

NAME = "fuse_input"
EXACTNESS: Exactness = "reassoc"


def _readers(groups: GroupGraph) -> dict[fx.Node, list[int]]:
    readers: dict[fx.Node, list[int]] = {}
    for group in groups.groups.values():
        for tensor in group.inputs:
            readers.setdefault(tensor, []).append(group.id)
    return readers


def find(groups: GroupGraph, around: int | None = None) -> Iterator[Move]:
    """Pairs of groups with a common input, in graph order."""
    for readers in _readers(groups).values():
        for position, first in enumerate(readers):
            for second in readers[position + 1 :]:
                if around is None or around in (first, second):
                    yield (first, second)


def check(groups: GroupGraph, move: Move) -> Refusal | None:
    """One line per clause of `legal` that is this pass's own."""
    first, second = (groups.groups[member] for member in move)
    common = set(first.inputs) & set(second.inputs)
    if all(tensor.op == "get_attr" for tensor in common):
        return Refusal("they share a weight only, which both read row by row", second.nodes[0])
    return None


def rank(groups: GroupGraph, move: Move) -> int:
    """All moves are of one rank: the gain decides."""
    return 0
