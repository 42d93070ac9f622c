"""Join independent small groups without common data in one launch.

before:  q2 = rope(norm(q));  k2 = rope(norm(k))         two launches
after:   one kernel; a program looks at its number and runs the loop that owns it
why:     a launch (a barrier between threads on the CPU) costs as much as the work of a small group
legal:   both have kernels; neither depends on the other; both take less than a few launches; they stand at about the
         same place of the graph (one reads what is ready when the other starts); the pair has a kernel; it pays
source:  horizontal fusion, survey of LLM inference, section on kernel fusion; HFTA; XLA horizontal loop fusion
"""

from __future__ import annotations

from collections.abc import Iterator

from torchweld.graph.fusion import Move
from torchweld.graph.groups import GroupGraph
from torchweld.graph.rewrite import Exactness, Refusal

NAME = "fuse_horizontal"
EXACTNESS: Exactness = "exact"
SMALL_IN_LAUNCHES = 8.0


def find(groups: GroupGraph, around: int | None = None) -> Iterator[Move]:
    """Pairs whose results a common reader waits for, and pairs that wait for the same producer."""
    centres = list(groups.dag.nodes) if around is None else _neighbours(groups, around)
    for centre in centres:
        for family in (list(groups.dag.predecessors(centre)), list(groups.dag.successors(centre))):
            family.sort()
            for position, first in enumerate(family):
                for second in family[position + 1 :]:
                    if around is None or around in (first, second):
                        yield (first, second)


def _neighbours(groups: GroupGraph, around: int) -> list[int]:
    return [*groups.dag.predecessors(around), *groups.dag.successors(around)]


def check(groups: GroupGraph, move: Move) -> Refusal | None:
    """One line per clause of `legal` that is this pass's own."""
    first, second = move
    if groups.ancestors[first] >> second & 1 or groups.ancestors[second] >> first & 1:
        return Refusal("one waits for the other", groups.groups[second].nodes[0])
    launch = groups.launch_cost()
    if max(groups.cost(first), groups.cost(second)) > SMALL_IN_LAUNCHES * launch:
        return Refusal("too large for a shared launch to matter", groups.groups[second].nodes[0])
    return None


def rank(groups: GroupGraph, move: Move) -> int:
    """All moves are of one rank: the gain decides."""
    return 0
