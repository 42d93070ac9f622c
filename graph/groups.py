"""The group graph: which operations share a kernel, and what may be joined.

Every computing node of a captured graph starts as a group of its own; fusion contracts sets of groups.  Views and
index sources (arange, full) belong to nobody: each group that reads through them has them as its own, for free.
The graph of groups is a `networkx.DiGraph`; ancestors and descendants are kept as integer bit sets, so the test
whether a contraction keeps the graph free of cycles is one AND:

    contracting S is safe  iff  no group outside S lies both below and above S
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from torchweld.graph.index import ZERO, evaluate
from torchweld.graph.meaning import Kind, rule_of
from torchweld.graph.rewrite import Refusal
from torchweld.graph.terms import Expr

if TYPE_CHECKING:
    import networkx as nx


def _networkx() -> Any:
    """Imported at the first graph of groups: a start from the cache has none, and would wait 0.2 s for it."""
    return import_module("networkx")


@dataclass(frozen=True)
class Work:
    """What one run of a lowered group moves and computes, as expressions of the sizes.

    reads, writes: bytes, every distinct buffer once.  flops: arithmetic including what is computed again.
    parts: loops with a grid of their own in the one launch.
    """

    reads: Expr
    writes: Expr
    flops: Expr
    parts: int


NOTHING = Work(ZERO, ZERO, ZERO, 1)


class Lowered(Protocol):
    """A group that has a kernel."""

    @property
    def work(self) -> Work: ...


@dataclass(frozen=True, eq=False)
class Group:
    """Computing nodes in topological order; `eager` says why the group has no kernel."""

    id: int
    nodes: tuple[fx.Node, ...]
    eager: str | None = None

    @cached_property
    def members(self) -> frozenset[fx.Node]:
        """The computing nodes as a set."""
        return frozenset(self.nodes)

    @cached_property
    def inside(self) -> tuple[fx.Node, ...]:
        """The computing nodes and the free nodes that they read through, operands before users."""
        if self.eager is not None:
            return self.nodes
        seen: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            if node in seen:
                return
            for operand in node.all_input_nodes:
                if operand in self.members or is_free(operand):
                    visit(operand)
            seen[node] = None

        for node in self.nodes:
            visit(node)
        return tuple(seen)

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Tensors that the group reads from outside, in order of first use."""
        inside = set(self.inside)
        found: dict[fx.Node, None] = {}
        for node in self.inside:
            for operand in node.all_input_nodes:
                if operand not in inside and has_tensor(operand):
                    found[operand] = None
        return tuple(found)

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """Computing nodes whose values somebody outside reads (through views or not)."""
        return tuple(
            node for node in self.nodes if any(user not in self.members for user in real_users(node))
        )


def has_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor or several."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(part, torch.Tensor) for part in value)
    return isinstance(value, torch.Tensor)


def kind_of(node: fx.Node) -> Kind | None:
    """The kind of a node's rule; None for inputs, weights, sizes and operations without a rule."""
    rule = rule_of(node)
    if rule is None:
        return None
    parent = node.args[0] if node.args else None
    if (
        rule.kind == "view"
        and isinstance(parent, fx.Node)
        and isinstance(parent.meta.get("val"), (tuple, list))
    ):
        parent_kind = kind_of(parent)
        return "view" if parent_kind is None else parent_kind
    return rule.kind


def is_free(node: fx.Node) -> bool:
    """Whether a node costs nothing: a view, a source, or an operation with several results that its pieces stand for.

    A piece of an operation without a rule is no view: that operation hands out finished tensors.  Decoding a stored
    weight is free in this sense, too: it belongs into the loads of whoever reads the weight, never into memory.
    """
    rule = rule_of(node)
    if rule is None:
        return False
    if node.target is torch.ops.torchweld.dequantize.default:
        data = node.args[0]
        return isinstance(data, fx.Node) and data.op == "get_attr"
    if isinstance(node.meta.get("val"), (tuple, list)):
        return rule.kind != "choice"  # its pieces alone have no kernel
    parent = node.args[0] if node.args else None
    if isinstance(parent, fx.Node) and isinstance(parent.meta.get("val"), (tuple, list)):
        return rule_of(parent) is not None and kind_of(node) == "view"
    return rule.kind in ("view", "source")


def real_users(node: fx.Node) -> Iterator[fx.Node]:
    """Users that are not free, looking through free ones."""
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        if is_free(user):
            stack.extend(user.users)
        elif user.op == "output" or has_tensor(user):
            yield user


def real_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Tensor operands that are not free, looking through free ones."""
    stack, seen = list(node.all_input_nodes), set()
    while stack:
        operand = stack.pop()
        if operand in seen:
            continue
        seen.add(operand)
        if is_free(operand):
            stack.extend(operand.all_input_nodes)
        elif has_tensor(operand):
            yield operand


Lowering = Callable[[Group], "Lowered | Refusal"]


@dataclass
class GroupGraph:
    """Groups as a DAG.  `lower` tells whether a set of nodes has a kernel, `price` what it costs in microseconds."""

    graph_module: fx.GraphModule
    lower: Lowering
    price: Callable[[Work], float]
    hints: Mapping[str, int]
    groups: dict[int, Group] = field(default_factory=dict)
    dag: nx.DiGraph = field(default_factory=lambda: _networkx().DiGraph())
    ancestors: dict[int, int] = field(default_factory=dict)
    descendants: dict[int, int] = field(default_factory=dict)
    owner: dict[fx.Node, int] = field(default_factory=dict)
    order: dict[fx.Node, int] = field(default_factory=dict)
    lowered: dict[int, Lowered] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph_module: fx.GraphModule,
        lower: Lowering,
        price: Callable[[Work], float],
        hints: Mapping[str, int],
    ) -> GroupGraph:
        """Every computing node as its own group; those that `lower` refuses become eager groups."""
        graph = cls(graph_module, lower, price, dict(hints))
        for position, node in enumerate(graph_module.graph.nodes):
            graph.order[node] = position
            if node.op in ("placeholder", "get_attr", "output") or is_free(node) or not has_tensor(node):
                continue
            if node not in graph.owner:
                graph._add_node(node)
        for group in graph.groups.values():
            for operand in real_operands(group.nodes[0]):
                if operand in graph.owner:
                    graph.dag.add_edge(graph.owner[operand], group.id)
        graph._close()
        return graph

    def _add_node(self, node: fx.Node) -> None:
        group = Group(len(self.groups), (node,))
        result: Lowered | Refusal = Refusal(f"{node.target}: no rule gives its elements", node)
        if rule_of(node) is not None:
            result = self.lower(group)
        if isinstance(result, Refusal):
            pieces = tuple(node.users) if isinstance(node.meta.get("val"), (tuple, list)) else ()
            group = Group(group.id, (node, *pieces), eager=result.reason)
        else:
            self.lowered[group.id] = result
        self.groups[group.id] = group
        for member in group.nodes:
            self.owner[member] = group.id
        self.dag.add_node(group.id)

    def _close(self) -> None:
        """Ancestors and descendants of every group from the edges."""
        order = list(_networkx().topological_sort(self.dag))
        for group in order:
            bits = 0
            for parent in self.dag.predecessors(group):
                bits |= self.ancestors[parent] | (1 << parent)
            self.ancestors[group] = bits
        for group in reversed(order):
            bits = 0
            for child in self.dag.successors(group):
                bits |= self.descendants[child] | (1 << child)
            self.descendants[group] = bits

    def is_acyclic_after(self, members: Iterable[int]) -> bool:
        """Whether contracting `members` keeps the graph of groups free of cycles."""
        below = above = mask = 0
        for member in members:
            below |= self.descendants[member]
            above |= self.ancestors[member]
            mask |= 1 << member
        return bool(below & above & ~mask == 0)

    def joined(self, members: Iterable[int]) -> Group:
        """The group that contracting `members` would make (it has no number yet)."""
        nodes = sorted((n for m in members for n in self.groups[m].nodes), key=self.order.__getitem__)
        return Group(-1, tuple(nodes))

    def is_joinable(self, group: int) -> bool:
        """Whether a group may get a kernel with others: all but those that terms have no word for."""
        first = self.groups[group]
        return first.eager is None or kind_of(first.nodes[0]) == "choice"

    def cost(self, group: int) -> float:
        """Modelled microseconds of a group; of the eager ones those that may be joined are launches of their own."""
        lowered = self.lowered.get(group)
        if lowered is None:
            return self.launch_cost() if self.is_joinable(group) else 0.0
        return self.price(lowered.work)

    def launch_cost(self) -> float:
        """Modelled microseconds of a kernel that does nothing."""
        return self.price(NOTHING)

    def contract(self, members: Iterable[int]) -> int:
        """Replace `members` by one group and give its number.

        Raises ValueError where the contraction makes a cycle or has no kernel: callers check first.
        """
        chosen = list(members)
        if not self.is_acyclic_after(chosen):
            raise ValueError(f"contracting groups {chosen} makes a cycle")
        joined = self.joined(chosen)
        result = self.lower(joined)
        if isinstance(result, Refusal):
            raise ValueError(f"contracting groups {chosen}: {result.reason}")
        new: int = max(self.dag.nodes) + 1
        self.groups[new] = Group(new, joined.nodes)
        self.lowered[new] = result
        self._rewire(chosen, new)
        for node in joined.nodes:
            self.owner[node] = new
        return new

    def _rewire(self, members: list[int], new: int) -> None:
        mask = sum(1 << member for member in members)
        above = below = 0
        for member in members:
            above |= self.ancestors[member]
            below |= self.descendants[member]
            for parent in list(self.dag.predecessors(member)):
                if parent not in members:
                    self.dag.add_edge(parent, new)
            for child in list(self.dag.successors(member)):
                if child not in members:
                    self.dag.add_edge(new, child)
        self.dag.add_node(new)
        self.ancestors[new], self.descendants[new] = above & ~mask, below & ~mask
        for member in members:
            self.dag.remove_node(member)
            for table in (self.groups, self.lowered, self.ancestors, self.descendants):
                table.pop(member, None)
        bit = 1 << new
        for x in _bits(self.ancestors[new]):
            self.descendants[x] = (self.descendants[x] & ~mask) | self.descendants[new] | bit
        for x in _bits(self.descendants[new]):
            self.ancestors[x] = (self.ancestors[x] & ~mask) | self.ancestors[new] | bit

    def topological(self) -> list[Group]:
        """Groups in an order in which every group follows what it reads; ties by position in the graph."""
        order = _networkx().lexicographical_topological_sort(
            self.dag, key=lambda g: self.order[self.groups[g].nodes[0]]
        )
        return [self.groups[group] for group in order]

    def nbytes(self, expr: Expr) -> int:
        """An expression of sizes at the hinted sizes."""
        return int(evaluate(expr, self.hints))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
