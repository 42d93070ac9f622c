"""How a fusion pass runs over the group graph: the best legal move first, until none gains.

A fusion pass is a module with NAME, EXACTNESS, `find` and `check`.  A move is a set of groups to contract; its gain is
what the cost model says: the sum of the parts' times minus the time of the whole.  Every refused move keeps its reason.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from torchweld.graph.groups import GroupGraph, Lowered
from torchweld.graph.rewrite import Exactness, Refusal

Move = tuple[int, ...]
Measure = Callable[[GroupGraph, Lowered], float]


class FusionPass(Protocol):
    """What a fusion pass module offers.

    `find` yields moves; with `around`, only those that the new group `around` takes part in.  `check` gives the pass's
    own reasons against a move; cycles, kernels that do not exist and moves that do not pay are refused for all passes.
    Moves of a lower `rank` come first whatever they gain.
    """

    @property
    def NAME(self) -> str: ...

    @property
    def EXACTNESS(self) -> Exactness: ...

    def find(self, groups: GroupGraph, around: int | None = None) -> Iterator[Move]: ...

    def check(self, groups: GroupGraph, move: Move) -> Refusal | None: ...

    def rank(self, groups: GroupGraph, move: Move) -> int: ...


@dataclass(frozen=True)
class FusionOutcome:
    """What one fusion pass did; `saved` is the modelled gain in microseconds at the hinted sizes."""

    name: str
    matched: int
    applied: int
    refused: tuple[tuple[Refusal, int], ...]
    saved: float


def weigh(
    groups: GroupGraph, pass_: FusionPass, move: Move, measure: Measure | None = None
) -> float | Refusal:
    """The gain of a move in microseconds, or why it is refused."""
    for member in move:
        reason = groups.groups[member].eager
        if reason is not None and not groups.is_joinable(member):
            return Refusal(f"runs eagerly: {reason}", groups.groups[member].nodes[0])
    node = groups.groups[move[-1]].nodes[-1]
    if not groups.is_acyclic_after(move):
        return Refusal("would make a cycle: another group stands between them", node)
    refusal = pass_.check(groups, move)
    if refusal is not None:
        return refusal
    whole = groups.lower(groups.joined(move))
    if isinstance(whole, Refusal):
        return whole
    if measure is None:
        gain = sum(groups.cost(member) for member in move) - groups.price(whole.work)
    else:
        known = [groups.lowered[member] for member in move if member in groups.lowered]
        gain = sum(measure(groups, lowered) for lowered in known) - measure(groups, whole)
    return (
        gain
        if gain > 0
        else Refusal("does not pay by the cost model" if measure is None else "slower as measured", node)
    )


def run_fusion(
    groups: GroupGraph, pass_: FusionPass, *, fuel: int | None = None, measure: Measure | None = None
) -> FusionOutcome:
    """Contract groups by one pass's moves, best first; `fuel` bounds how many, `measure` replaces the cost model."""
    heap: list[tuple[int, float, int, Move]] = []
    refused: Counter[str] = Counter()
    examples: dict[str, Refusal] = {}
    ticket, seen = count(), set[Move]()

    def consider(move: Move) -> None:
        if move in seen:
            return
        seen.add(move)
        gain = weigh(groups, pass_, move, measure)
        if isinstance(gain, Refusal):
            refused[gain.reason] += 1
            examples.setdefault(gain.reason, gain)
        else:
            heapq.heappush(heap, (pass_.rank(groups, move), -gain, next(ticket), move))

    for move in pass_.find(groups):
        consider(move)
    applied, saved = 0, 0.0
    while heap and (fuel is None or applied < fuel):
        _, negative_gain, _, move = heapq.heappop(heap)
        if any(member not in groups.groups for member in move):
            continue
        if not groups.is_acyclic_after(move):
            refused["would make a cycle: another group stands between them"] += 1
            continue
        new = groups.contract(move)
        applied, saved = applied + 1, saved - negative_gain
        for follow_up in pass_.find(groups, new):
            consider(follow_up)
    reasons = tuple((examples.get(reason, Refusal(reason)), times) for reason, times in refused.most_common())
    return FusionOutcome(pass_.NAME, len(seen), applied, reasons, saved)
