"""What a pass is and how it runs over a graph.

A pass is a *module* with `NAME`, `EXACTNESS`, `find`, `check` and `rewrite`; it satisfies the protocol
`Pass` below. Timing, skipping, verification and bisection are the pipeline's; this file only knows how to
apply one pass to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from torch import fx

from torchweld.graph.edit import insert_node, replace, writes

Exactness = Literal["exact", "reassoc", "lossy"]
Target = Callable[..., Any]

# Every productive round shortens or renames something, so real graphs settle in two or three; the bound
# turns two passes' worth of ping-pong inside one pass (a bug) into an error instead of a hang.
MAX_ROUNDS = 50


class RewriteError(RuntimeError):
    """A pass broke its own contract: names the pass and the node."""


@dataclass(frozen=True)
class Refusal:
    """Why a site was left alone, and the node that is to blame."""

    reason: str
    node: fx.Node | None = None


class Site(Protocol):
    """A place where a pass could act. `anchor` is the node whose value the rewrite takes over."""

    @property
    def anchor(self) -> fx.Node: ...


@dataclass(frozen=True)
class NodeSite:
    """The plainest site: one node."""

    anchor: fx.Node


SiteType = TypeVar("SiteType", bound=Site)


class Pass(Protocol[SiteType]):
    """What a pass module offers.

    `find` yields sites in graph order; it may be interleaved with rewrites, so it iterates with `walk`.
    `check` returns why a site must be left alone, or None. `rewrite` redirects the users of the anchor;
    what died with it is swept by `run_pass`.
    """

    @property
    def NAME(self) -> str: ...

    @property
    def EXACTNESS(self) -> Exactness: ...

    def find(self, graph_module: fx.GraphModule) -> Iterator[SiteType]: ...

    def check(self, graph_module: fx.GraphModule, site: SiteType) -> Refusal | None: ...

    def rewrite(self, graph_module: fx.GraphModule, site: SiteType) -> None: ...


@dataclass(frozen=True)
class PassOutcome:
    """What one pass did: sites matched = applied + refused (+ those left when the fuel ran out)."""

    name: str
    matched: int
    refused: tuple[Refusal, ...]
    applied: int


def walk(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes in graph order, from a snapshot, without those that a rewrite erased in the meantime."""
    for node in tuple(graph_module.graph.nodes):
        if not is_erased(node):
            yield node


def is_erased(node: fx.Node) -> bool:
    """Was this node taken out of its graph?"""
    return bool(node._erased)


def run_pass(graph_module: fx.GraphModule, pass_: Pass[Any], fuel: int | None = None) -> PassOutcome:
    """Apply `pass_` until it finds nothing more to do, at most `fuel` times; the graph is runnable
    afterwards.

    Refusals are those of the last sweep, so a site that became legal on the way does not count as refused.
    Raises RewriteError when the pass does not settle.
    """
    applied = 0
    for _ in range(MAX_ROUNDS):
        before = applied
        refused: list[Refusal] = []
        for site in pass_.find(graph_module):
            if is_erased(site.anchor):
                continue
            refusal = pass_.check(graph_module, site)
            if refusal is not None:
                refused.append(refusal)
                continue
            if fuel is not None and applied >= fuel:
                return _finish(graph_module, pass_.NAME, refused, applied, left=1)
            producers = site.anchor.all_input_nodes
            pass_.rewrite(graph_module, site)
            sweep(graph_module.graph, [site.anchor, *producers])
            applied += 1
        if applied == before:
            return _finish(graph_module, pass_.NAME, refused, applied, left=0)
    raise RewriteError(
        f"pass {pass_.NAME} still rewrites after {MAX_ROUNDS} rounds: two of its rules undo each other"
    )


def _finish(
    graph_module: fx.GraphModule, name: str, refused: list[Refusal], applied: int, *, left: int
) -> PassOutcome:
    if applied:
        graph_module.recompile()
    return PassOutcome(name, applied + len(refused) + left, tuple(refused), applied)


def sweep(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` that nothing reads, then their producers that nothing reads any more.

    Linear in what is erased. Placeholders, the output and nodes that write stay.
    """
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if is_erased(node) or node.users or node.op in ("placeholder", "output") or writes(node):
            continue
        producers = node.all_input_nodes
        graph.erase_node(node)
        pending.extend(producers)


@dataclass(frozen=True)
class Spelling:
    """A call that is to take a node's place; arguments may be nodes, constants and further spellings."""

    target: Target
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[fx.GraphModule, fx.Node], "Spelling | fx.Node | Refusal | None"]
"""Other spelling of a node: a call, an existing node with the same value, why not, or None for "not my
business"."""


@dataclass(frozen=True)
class RuleSite:
    """A node that `rule` has an opinion about."""

    anchor: fx.Node
    rule: Rule


def find_by_rules(graph_module: fx.GraphModule, rules: Mapping[Target, Rule]) -> Iterator[RuleSite]:
    """Sites of a pass that is a table from call target to rule."""
    for node in walk(graph_module):
        if node.op != "call_function" or not node.users:
            continue
        rule = rules.get(node.target)  # type: ignore[arg-type]  # op is call_function: the target is callable
        if rule is not None and rule(graph_module, node) is not None:
            yield RuleSite(node, rule)


def check_rule(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """The refusal of the site's rule, if that is its answer."""
    answer = site.rule(graph_module, site.anchor)
    return answer if isinstance(answer, Refusal) else None


def apply_rule(graph_module: fx.GraphModule, site: RuleSite, made_by: str) -> None:
    """Let the anchor be what its rule spells, or let its users read the node that the rule names."""
    answer = site.rule(graph_module, site.anchor)
    if answer is None or isinstance(answer, Refusal):
        raise RewriteError(f"{made_by}: rewrite of {site.anchor.name} without a spelling; check it first")
    if isinstance(answer, fx.Node):
        replace(site.anchor, answer)
    else:
        respell(site.anchor, answer, made_by)


def respell(node: fx.Node, spelling: Spelling, made_by: str) -> None:
    """Turn `node` in place into another call with the same value: name, users, shape and source line stay.

    The shape rule does not run again (the shape is what the two spellings have in common by definition): with
    symbolic sizes it costs 2.4 ms per reshape, and canonicalisation respells a thousand nodes per model.
    """
    graph = node.graph
    args = tuple(_resolve(graph, argument, node, made_by) for argument in spelling.args)
    kwargs = {name: _resolve(graph, argument, node, made_by) for name, argument in spelling.kwargs.items()}
    node.target, node.args, node.kwargs = spelling.target, args, kwargs
    node.meta["made_by"] = made_by


def build(graph: fx.Graph, spelling: Spelling | fx.Node, before: fx.Node, made_by: str) -> fx.Node:
    """Insert the nodes of `spelling` before `before`, innermost first; an existing node is returned as it
    is."""
    if isinstance(spelling, fx.Node):
        return spelling
    args = tuple(_resolve(graph, argument, before, made_by) for argument in spelling.args)
    kwargs = {name: _resolve(graph, argument, before, made_by) for name, argument in spelling.kwargs.items()}
    return insert_node(graph, before, spelling.target, args, kwargs, made_by=made_by, like=before)


def _resolve(graph: fx.Graph, argument: Any, before: fx.Node, made_by: str) -> Any:
    """`argument` with every spelling in it built."""
    if isinstance(argument, Spelling):
        return build(graph, argument, before, made_by)
    if isinstance(argument, (list, tuple)):
        return [_resolve(graph, part, before, made_by) for part in argument]
    return argument
