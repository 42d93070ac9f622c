"""The group graph: contraction against networkx, and what belongs to a group."""

from __future__ import annotations

import random

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.graph.stub_groups import microseconds, one_launch_each, stub_graph
from tests.passes.fusion_cases import FusionCase, numbers
from torchweld.graph.groups import Group, GroupGraph, Work, is_free, kind_of, real_operands, real_users
from torchweld.graph.rewrite import Refusal


@st.composite
def dags(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Operands of up to ten nodes; every node reads up to three earlier ones."""
    size = draw(st.integers(2, 10))
    return [
        tuple(sorted(draw(st.sets(st.integers(0, node - 1), max_size=3)))) if node else ()
        for node in range(size)
    ]


def is_acyclic_quotient(dag: nx.DiGraph, members: set[int]) -> bool:
    """Whether the graph with `members` as one node has no cycle, by building it."""
    quotient = nx.DiGraph()
    quotient.add_nodes_from("set" if node in members else node for node in dag)
    for a, b in dag.edges:
        ends = "set" if a in members else a, "set" if b in members else b
        if ends[0] != ends[1]:
            quotient.add_edge(*ends)
    return bool(nx.is_directed_acyclic_graph(quotient))


def bits(mask: int) -> set[int]:
    return {bit for bit in range(mask.bit_length()) if mask >> bit & 1}


def check_invariants(graph: GroupGraph) -> None:
    """Bit sets, edges, owners and order tell the truth."""
    assert nx.is_directed_acyclic_graph(graph.dag)
    assert set(graph.dag) == set(graph.groups) == set(graph.ancestors) == set(graph.descendants)
    for number, group in graph.groups.items():
        assert bits(graph.ancestors[number]) == nx.ancestors(graph.dag, number)
        assert bits(graph.descendants[number]) == nx.descendants(graph.dag, number)
        assert all(graph.owner[node] == number for node in group.nodes)
        assert [graph.order[node] for node in group.nodes] == sorted(
            graph.order[node] for node in group.nodes
        )
        read = {graph.owner[n] for node in group.nodes for n in real_operands(node) if n in graph.owner}
        assert set(graph.dag.predecessors(number)) == read - {number}
    finished: set[int] = set()
    for group in graph.topological():
        number = graph.owner[group.nodes[0]]
        assert nx.ancestors(graph.dag, number) <= finished
        finished.add(number)
    assert finished == set(graph.groups)


@given(dags(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_random_contractions_keep_the_graph(edges: list[tuple[int, ...]], chance: random.Random) -> None:
    graph = stub_graph(edges)
    check_invariants(graph)
    for _ in range(6):
        members = chance.sample(sorted(graph.groups), min(len(graph.groups), chance.choice((2, 2, 3))))
        acyclic = is_acyclic_quotient(graph.dag, set(members))
        assert graph.is_acyclic_after(members) == acyclic
        if acyclic and len(members) > 1:
            nodes = {node for member in members for node in graph.groups[member].nodes}
            new = graph.contract(members)
            assert set(graph.groups[new].nodes) == nodes
            check_invariants(graph)


def test_ties_run_in_the_order_of_the_graph() -> None:
    graph = stub_graph([(), (), (), ()])
    new = graph.contract((1, 3))
    assert [graph.owner[group.nodes[0]] for group in graph.topological()] == [0, new, 2]


def test_contracting_into_a_cycle_raises() -> None:
    graph = stub_graph([(), (0,), (0, 1)])
    with pytest.raises(ValueError, match=r"contracting groups \[0, 2\] makes a cycle"):
        graph.contract((0, 2))


def test_contracting_without_a_kernel_raises() -> None:
    graph = stub_graph(
        [(), (0,)], lambda g: Refusal("two do not fit") if len(g.nodes) > 1 else one_launch_each(g)
    )
    with pytest.raises(ValueError, match=r"contracting groups \[0, 1\]: two do not fit"):
        graph.contract((0, 1))


def test_costs_come_from_the_price_of_the_work() -> None:
    prices = {0: 3, 1: 5}
    graph = stub_graph([(), (0,)], lambda group: microseconds(prices.get(group.id, 1)))
    assert (graph.cost(0), graph.cost(1), graph.launch_cost()) == (3.0, 5.0, 0.0)
    assert isinstance(graph.lowered[0].work, Work)


def test_a_group_that_is_refused_alone_runs_eagerly_and_is_not_priced() -> None:
    graph = stub_graph([(), (0,)], lambda group: Refusal("too odd") if group.id == 1 else microseconds(3))
    assert graph.groups[1].eager == "too odd"
    assert graph.cost(1) == 0.0 and 1 not in graph.lowered


def test_views_belong_to_the_groups_that_read_through_them() -> None:
    case = FusionCase(lambda m, x: (v := x.exp().transpose(0, 1).reshape(6, 2)).neg() + v, numbers(3, 4))
    neg, exp = case.group_of("neg"), case.group_of("exp")
    assert [node.name for node in exp.inside] == ["exp"]
    assert [node.name for node in neg.inside][-1] == "neg" and len(neg.inside) == 3
    assert [node.name for node in neg.inputs] == ["exp"], "what it reads is what stands in memory"
    assert [node.name for node in exp.outputs] == ["exp"]
    assert [node.name for node in real_users(exp.nodes[0])] == ["add", "neg"]
    assert [node.name for node in real_operands(case.group_of("add").nodes[0])] == ["exp", "neg"]


def test_sources_are_free() -> None:
    case = FusionCase(lambda m, x: x + torch.arange(4, device=x.device), numbers(3, 4))
    assert case.ops() == ["add"]
    assert [node.name for node in case.group_of("add").inputs] == ["inputs_0"]


def test_an_output_is_what_somebody_outside_reads() -> None:
    case = FusionCase(lambda m, x: (x.exp().neg().abs(), x.sum(0)), numbers(3, 4))
    exp, neg = case.group_of("exp"), case.group_of("neg")
    new = case.groups.contract((exp.id, neg.id))
    assert [node.name for node in case.groups.groups[new].outputs] == ["neg"]
    returned = case.group_of("abs")
    assert returned.outputs == returned.nodes, "the graph's result reads it"


def test_pieces_of_a_split_are_views() -> None:
    case = FusionCase(lambda m, x: (p := torch.split(x, 2, 1))[0].exp() + p[1], numbers(3, 4))
    assert case.ops() == ["exp", "add"]
    assert {node.name for node in case.group_of("add").inputs} == {"exp", "inputs_0"}


def test_results_of_an_operation_without_a_rule_are_one_eager_group() -> None:
    case = FusionCase(lambda m, x: (t := torch.sort(x))[0].exp() + t[1], numbers(3, 4))
    group = case.group_of("sort")
    assert group.eager == "aten.sort.default: no rule gives its elements"
    assert [node.target.__name__ for node in group.nodes] == ["sort.default", "getitem", "getitem"]  # type: ignore[union-attr]
    assert not any(is_free(node) for node in group.nodes), "they are finished tensors, not views"
    case.assert_fused_numbers()


def test_both_results_of_a_maximum_are_computed() -> None:
    """A piece of an operation with a rule stands for it and has its kind."""
    case = FusionCase(lambda m, x: tuple(torch.max(x, 1)), numbers(3, 4))
    assert {kind_of(node) for node in case.groups.owner} == {"reduce"}
    case.assert_fused_numbers()


def test_decoding_a_stored_weight_is_free() -> None:
    stored = torch.zeros(6, 34, dtype=torch.uint8)
    case = FusionCase(
        lambda m, x: F.linear(x, torch.ops.torchweld.dequantize(m.w, "Q8_0", 32)), numbers(5, 32), w=stored
    )
    assert case.ops() == ["linear"]
    assert {node.name for node in case.group_of("linear").inputs} == {"inputs_0", "w"}, (
        "the bytes as they are stored"
    )


def test_decoding_computed_bytes_is_not_free() -> None:
    case = FusionCase(
        lambda m, x: torch.ops.torchweld.dequantize(x.flip(0), "Q8_0", 32),
        torch.zeros(6, 34, dtype=torch.uint8),
    )
    assert case.ops() == ["flip", "dequantize"]


def test_joined_has_the_nodes_in_graph_order() -> None:
    graph = stub_graph([(), (0,), (1,)])
    joined = graph.joined((2, 0, 1))
    assert isinstance(joined, Group)
    assert [graph.order[node] for node in joined.nodes] == [1, 2, 3]
