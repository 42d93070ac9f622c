"""How a pass runs: rounds, fuel, refusals, sweeping."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from tests.passes.support import Case, aten, draw
from torchweld.graph.edit import replace
from torchweld.graph.rewrite import NodeSite, Refusal, RewriteError, Spelling, build, run_pass, sweep, walk


def negations(graph_module: fx.GraphModule) -> Iterator[NodeSite]:
    for node in walk(graph_module):
        if node.target is aten.neg.default:
            yield NodeSite(node)


def drop(graph_module: fx.GraphModule, site: NodeSite) -> None:
    source = site.anchor.args[0]
    assert isinstance(source, fx.Node)
    replace(site.anchor, source)


DROP_NEGATIONS = SimpleNamespace(
    NAME="drop", EXACTNESS="lossy", find=negations, check=lambda graph_module, site: None, rewrite=drop
)


def three_negations() -> Case:
    return Case(lambda m, x: x.neg().neg().neg() + 1, draw(2, 3))


def test_rewrites_a_chain_in_one_run() -> None:
    case = three_negations()
    outcome = run_pass(case.graph_module, DROP_NEGATIONS)
    assert (outcome.matched, outcome.applied, outcome.refused) == (3, 3, ())
    assert case.count(aten.neg.default) == 0
    (found,) = case.graph_module(draw(2, 3))
    assert torch.equal(found, draw(2, 3) + 1)


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_fuel_stops_after_that_many(fuel: int) -> None:
    case = three_negations()
    outcome = run_pass(case.graph_module, DROP_NEGATIONS, fuel=fuel)
    assert outcome.applied == fuel
    assert (
        outcome.matched == fuel + 1
    )  # the one that it stopped at is matched, but neither applied nor refused
    assert case.count(aten.neg.default) == 3 - fuel


def test_refusals_keep_reason_and_node() -> None:
    case = three_negations()
    stubborn = SimpleNamespace(
        **{**vars(DROP_NEGATIONS), "check": lambda graph_module, site: Refusal("no", site.anchor)}
    )
    outcome = run_pass(case.graph_module, stubborn)
    assert (outcome.matched, outcome.applied) == (3, 0)
    assert [refusal.node.target for refusal in outcome.refused if refusal.node] == [aten.neg.default] * 3


def test_a_pass_that_undoes_itself_is_an_error_not_a_hang() -> None:
    case = Case(lambda m, x: -x, draw(2, 3))

    def again(graph_module: fx.GraphModule, site: NodeSite) -> None:
        replace(
            site.anchor,
            build(
                graph_module.graph, Spelling(aten.neg.default, (site.anchor.args[0],)), site.anchor, "again"
            ),
        )

    restless = SimpleNamespace(**{**vars(DROP_NEGATIONS), "NAME": "again", "rewrite": again})
    with pytest.raises(RewriteError, match="again still rewrites"):
        run_pass(case.graph_module, restless)


def test_build_makes_nested_spellings_with_metas() -> None:
    case = Case(lambda m, x: x.relu(), draw(2, 3))
    relu = case.only(aten.relu.default)
    made = build(
        case.graph_module.graph,
        Spelling(aten.cat.default, ([relu.args[0], Spelling(aten.neg.default, (relu.args[0],))], -1)),
        relu,
        "test",
    )
    assert made.meta["made_by"] == "test"
    assert made.meta["val"].shape[-1] == 6
    assert case.only(aten.neg.default) in made.all_input_nodes


def test_sweep_takes_producers_but_not_the_signature() -> None:
    case = Case(lambda m, x, y: (x.relu().neg(), y)[1], draw(2, 3), draw(2, 3, seed=1))
    graph = case.graph_module.graph
    (x, _) = case.program.placeholders
    with graph.inserting_after(x):
        first = graph.call_function(aten.relu.default, (x,))
    with graph.inserting_after(first):
        second = graph.call_function(aten.neg.default, (first,))
    sweep(graph, [second])
    assert [node.op for node in graph.nodes] == ["placeholder", "placeholder", "output"]
