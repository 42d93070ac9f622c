"""The engine of the fusion passes: what it refuses for all of them, in which order it moves, when it stops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.graph.stub_groups import StubKernel, microseconds, one_launch_each, stub_graph
from torchweld.graph.fusion import Move, run_fusion, weigh
from torchweld.graph.groups import Group, GroupGraph, Lowered
from torchweld.graph.rewrite import Exactness, Refusal

CYCLE = "would make a cycle: another group stands between them"


@dataclass(frozen=True)
class JoinEdges:
    """Every edge is a move; `forbidden` moves are refused, `ranks` orders them."""

    forbidden: tuple[Move, ...] = ()
    late: tuple[Move, ...] = ()
    only: tuple[Move, ...] | None = None
    NAME: str = "join_edges"
    EXACTNESS: Exactness = "exact"

    def find(self, groups: GroupGraph, around: int | None = None) -> Iterator[Move]:
        for move in self.only if self.only is not None else list(groups.dag.edges):
            if around is None or around in move:
                yield move

    def check(self, groups: GroupGraph, move: Move) -> Refusal | None:
        return Refusal("forbidden") if move in self.forbidden else None

    def rank(self, groups: GroupGraph, move: Move) -> int:
        return int(move in self.late)


CHAIN = [(), (0,), (1,), (2,)]


def test_joins_until_nothing_gains() -> None:
    graph = stub_graph(CHAIN)
    outcome = run_fusion(graph, JoinEdges())
    assert len(graph.groups) == 1
    assert (outcome.name, outcome.applied, outcome.saved) == ("join_edges", 3, 30.0)
    assert run_fusion(graph, JoinEdges()).applied == 0


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_fuel_bounds_the_moves(fuel: int) -> None:
    graph = stub_graph(CHAIN)
    outcome = run_fusion(graph, JoinEdges(), fuel=fuel)
    assert (outcome.applied, outcome.saved, len(graph.groups)) == (fuel, 10.0 * fuel, 4 - fuel)


def test_the_best_move_comes_first() -> None:
    """Joining 1 and 2 saves most; then nothing else has a kernel."""
    prices = {"n0": 10, "n1": 10, "n2": 10, "n3": 10, "n0 n1": 15, "n1 n2": 5, "n2 n3": 15}

    def kernels(group: Group) -> StubKernel | Refusal:
        names = " ".join(node.name for node in group.nodes)
        return microseconds(prices[names]) if names in prices else Refusal("no kernel")

    chain = stub_graph(CHAIN, kernels)
    outcome = run_fusion(chain, JoinEdges())
    assert (outcome.applied, outcome.saved) == (1, 15.0)
    assert [len(group.nodes) for group in chain.topological()] == [1, 2, 1]


def test_a_lower_rank_comes_before_a_greater_gain() -> None:
    def kernels(group: Group) -> StubKernel | Refusal:
        return Refusal("three") if len(group.nodes) > 2 else microseconds(10 if len(group.nodes) == 1 else 12)

    early = stub_graph([(), (0,), (1,)], kernels)
    run_fusion(early, JoinEdges(late=((0, 1),)))
    assert [len(group.nodes) for group in early.topological()] == [1, 2]
    late = stub_graph([(), (0,), (1,)], kernels)
    run_fusion(late, JoinEdges(late=((1, 2),)))
    assert [len(group.nodes) for group in late.topological()] == [2, 1]


def test_refuses_an_eager_member_and_names_it() -> None:
    graph = stub_graph(CHAIN, lambda g: Refusal("odd") if g.id == 2 else one_launch_each(g))
    refusal = weigh(graph, JoinEdges(), (1, 2))
    assert isinstance(refusal, Refusal) and refusal.reason == "runs eagerly: odd"
    assert refusal.node is graph.groups[2].nodes[0]


def test_refuses_a_cycle_before_it_asks_anything_else() -> None:
    graph = stub_graph([(), (0,), (0, 1)])
    refusal = weigh(graph, JoinEdges(forbidden=((0, 2),)), (0, 2))
    assert isinstance(refusal, Refusal) and refusal.reason == CYCLE


def test_refuses_what_the_pass_refuses() -> None:
    graph = stub_graph(CHAIN)
    refusal = weigh(graph, JoinEdges(forbidden=((0, 1),)), (0, 1))
    assert isinstance(refusal, Refusal) and refusal.reason == "forbidden"


def test_refuses_a_pair_without_a_kernel() -> None:
    graph = stub_graph(CHAIN, lambda g: Refusal("too wide") if len(g.nodes) > 1 else one_launch_each(g))
    refusal = weigh(graph, JoinEdges(), (0, 1))
    assert isinstance(refusal, Refusal) and refusal.reason == "too wide"


@pytest.mark.parametrize(("joined", "pays"), [(19, True), (20, False), (21, False)])
def test_refuses_what_does_not_gain(joined: int, pays: bool) -> None:
    """A move without a gain is none: it must be strictly cheaper."""
    graph = stub_graph([(), (0,)], lambda g: microseconds(joined if len(g.nodes) > 1 else 10))
    gain = weigh(graph, JoinEdges(), (0, 1))
    if pays:
        assert gain == 1.0
    else:
        assert isinstance(gain, Refusal) and gain.reason == "does not pay by the cost model"


def test_measured_times_replace_the_model() -> None:
    graph = stub_graph([(), (0,)])

    def measure(groups: GroupGraph, lowered: Lowered) -> float:
        return float(lowered.work.reads) ** 2

    refusal = weigh(graph, JoinEdges(), (0, 1), measure)
    assert weigh(graph, JoinEdges(), (0, 1)) == 10.0
    assert weigh(graph, JoinEdges(), (0, 1), lambda g, low: 1.0) == 1.0
    assert weigh(graph, JoinEdges(), (0, 1), measure) == 2 * 11.0**2 - 12.0**2
    assert not isinstance(refusal, Refusal)
    slow = weigh(graph, JoinEdges(), (0, 1), lambda g, low: 3.0 ** float(low.work.reads))
    assert isinstance(slow, Refusal) and slow.reason == "slower as measured"


def test_a_move_that_became_a_cycle_is_refused_when_its_turn_comes() -> None:
    """Both moves are legal at first; after 0 and 3 are joined, they stand between 1 and 2."""

    def two(group: Group) -> StubKernel | Refusal:
        return Refusal("three") if len(group.nodes) > 2 else one_launch_each(group)

    graph = stub_graph([(), (), (0, 1), (0, 1)], two)
    moves = JoinEdges(only=((0, 3), (1, 2)))
    assert all(graph.is_acyclic_after(move) for move in moves.only or ())
    outcome = run_fusion(graph, moves)
    assert outcome.applied == 1
    assert [(refusal.reason, times) for refusal, times in outcome.refused] == [(CYCLE, 1)]
    assert len(graph.groups) == 3


def test_a_move_of_a_group_that_is_gone_is_passed_over() -> None:
    graph = stub_graph(
        [(), (0,), (1,)], lambda g: Refusal("three") if len(g.nodes) > 2 else one_launch_each(g)
    )
    outcome = run_fusion(graph, JoinEdges(only=((0, 1), (1, 2))))
    assert (outcome.applied, outcome.matched, outcome.refused) == (1, 2, ())


def test_refusals_are_counted_and_keep_the_first_node() -> None:
    graph = stub_graph(
        CHAIN, lambda g: Refusal("wide", g.nodes[-1]) if len(g.nodes) > 1 else one_launch_each(g)
    )
    outcome = run_fusion(graph, JoinEdges(forbidden=((2, 3),)))
    assert [(refusal.reason, times) for refusal, times in outcome.refused] == [("wide", 2), ("forbidden", 1)]
    assert outcome.refused[0][0].node is graph.groups[1].nodes[0]
    assert (outcome.matched, outcome.applied) == (3, 0)


def test_a_move_that_is_found_twice_is_weighed_once() -> None:
    graph = stub_graph(CHAIN, lambda g: Refusal("wide") if len(g.nodes) > 1 else one_launch_each(g))
    outcome = run_fusion(graph, JoinEdges(only=((0, 1), (0, 1))))
    assert [(refusal.reason, times) for refusal, times in outcome.refused] == [("wide", 1)]
    assert outcome.matched == 1
