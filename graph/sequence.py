"""Sequence-axis analysis: which axis of each value is the sequence, and does a position depend on others?

    found = walk_sequence(program, rule_of)    # canonicalised and recognised; rules in `sequence_rules`
    found.along[node]                          # Along(axis=1, tokens=True)
    found.attentions, found.sources, found.tables, found.limit

Every value is *uniform* (no sequence axis), or *along* one axis on which position t depends on position t of its
operands alone. Only attention with a proved causal or window mask may look back, and only position sources (what
an arange or a slice of a table gives) may depend on where t is; both are listed, so that a rewrite can give them a
past. Any other op is refused with its node: nothing here is inferred from examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from torchweld.graph.match import dim_key, is_tensor, shape_of
from torchweld.graph.position_rules import make_prover
from torchweld.graph.positions import BATCH, HEAD, QUERY, Extents, Prover, Unprovable
from torchweld.graph.program import Program, source_line
from torchweld.graph.rewrite import Refusal

Expr = Any  # sympy has no stubs


class Mixes(Exception):
    """A position of this node depends on others in a way that has no state rule; the text says how."""


@dataclass(frozen=True)
class Along:
    """The sequence is the minor factor of `axis` (all of it, or merged behind the batch). `tokens`: does the value
    depend on the tokens, or on the position alone?"""

    axis: int
    tokens: bool


@dataclass(frozen=True)
class Line:
    """The value at position t is `first + slope * t`."""

    first: int
    slope: int


@dataclass(frozen=True)
class PositionSource:
    """A value that is a line of the position: with a past of P tokens it becomes `node + slope * P`."""

    node: fx.Node
    line: Line


@dataclass(frozen=True)
class PositionTable:
    """A slice `table[start : start + S]` of a constant: with a past of P tokens it starts at `start + P`."""

    node: fx.Node
    axis: int
    start: int


@dataclass(frozen=True)
class SequenceAnalysis:
    """What a causal program does with its sequence axis.

    tokens: the input with the sequence at axis 1, whose size is `symbol`; axis 0 is the `batch`, which is 1 or varies.
    along: every value with a sequence axis.
    attentions: in graph order.  key_masks: masks that depend on the key's position alone (ALiBi), by attention.
    limit: the positions that tables and capture allow, None for no limit.  token_limit: rows of the smallest table that
    the tokens index, None where they index none.  logits: the output.
    """

    tokens: fx.Node
    batch: Expr
    symbol: Expr
    along: Mapping[fx.Node, Along]
    attentions: tuple[fx.Node, ...]
    key_masks: Mapping[fx.Node, fx.Node]
    sources: tuple[PositionSource, ...]
    tables: tuple[PositionTable, ...]
    limit: int | None
    token_limit: int | None
    logits: fx.Node


@dataclass
class Scope:
    """What the rules of `sequence_rules` ask and tell while the graph is walked."""

    graph_module: fx.GraphModule
    tokens: fx.Node
    symbol: Expr
    prover: Prover
    along: dict[fx.Node, Along] = field(default_factory=dict)
    attentions: list[fx.Node] = field(default_factory=list)
    key_masks: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sources: list[PositionSource] = field(default_factory=list)
    tables: list[PositionTable] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    token_limits: list[int] = field(default_factory=list)

    def of(self, argument: object) -> Along | None:
        """The sequence axis of an argument; None for uniform values, sizes and literals."""
        return self.along.get(argument) if isinstance(argument, fx.Node) else None

    def follows(self, size: Expr) -> bool:
        """Does a size depend on the sequence length?"""
        return self.symbol in sympy.sympify(size).free_symbols

    def axes(self, node: fx.Node) -> list[int]:
        """Axes of a tensor whose size depends on the sequence length."""
        return [axis for axis, size in enumerate(shape_of(node)) if self.follows(size)]

    def is_whole(self, node: fx.Node, axis: int) -> bool:
        """Is `axis` exactly the sequence, not merged with the batch?"""
        return bool(shape_of(node)[axis] == self.symbol)

    def line(self, node: fx.Node, axis: int) -> Line | None:
        """`node` as a line of the position along `axis`, for every length; None where that is not proved."""
        others = iter((BATCH, HEAD))
        rank = len(shape_of(node))
        if rank > 3 or not self.is_whole(node, axis):
            return None
        index = tuple(
            QUERY if place == axis else sympy.Integer(0) if size == 1 else next(others)
            for place, size in enumerate(shape_of(node))
        )
        try:
            value = self.prover.value(node, index)
        except Unprovable:
            return None
        if not isinstance(value, sympy.Expr) or value.free_symbols - {QUERY}:
            return None
        first, slope = value.subs(QUERY, 0), value.coeff(QUERY)
        if not (first.is_Integer and slope.is_Integer) or sympy.expand(value - first - slope * QUERY) != 0:
            return None
        return Line(int(first), int(slope))


@dataclass(frozen=True)
class Rule:
    """How one op treats the sequence axis: the axis of its result (None where it has none), or Mixes. `sizes`: its size
    arguments may follow the sequence length (a reshape), which a value may not."""

    apply: Callable[[Scope, fx.Node], Along | None]
    sizes: bool = False


RuleOf = Callable[[fx.Node], Rule | None]


def walk_sequence(program: Program, rule_of: RuleOf) -> SequenceAnalysis | Refusal:
    """Walk `program` with the rule that `rule_of` gives per node; the first node that mixes positions refuses."""
    tokens = find_tokens(program)
    if isinstance(tokens, Refusal):
        return tokens
    batch, symbol = shape_of(tokens)[:2]
    prover = make_prover(program.graph_module, Extents(batch, sympy.Integer(1), symbol, symbol))
    scope = Scope(program.graph_module, tokens, symbol, prover, {tokens: Along(1, tokens=True)})
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            found = _follow(scope, node, rule_of)
        except Mixes as problem:
            return _unproved_mask(node) or Refusal(str(problem), node)
        if found is not None:
            scope.along[node] = found
    logits = _find_logits(program, scope)
    if isinstance(logits, Refusal):
        return logits
    if not scope.attentions:
        return Refusal("there is no attention: nothing would be cached", logits)
    highest = [size.high for size in program.sizes if size.dim == 1 and size.high is not None]
    limit = min([*scope.limits, *highest], default=None)
    return SequenceAnalysis(
        tokens, batch, symbol, scope.along, tuple(scope.attentions), scope.key_masks, tuple(scope.sources),
        tuple(scope.tables), limit, min(scope.token_limits, default=None), logits,
    )  # fmt: skip


def find_tokens(program: Program) -> fx.Node | Refusal:
    """The one tensor input that the graph reads: [batch, sequence, ...] with a sequence that varies."""
    read = [node for node in program.placeholders if is_tensor(node) and node.users]
    if len(read) != 1:
        names = ", ".join(node.name for node in read) or "none"
        blamed = read[-1] if read else None
        return Refusal(f"one tensor input, the tokens, is expected; the graph reads {names}", blamed)
    shape = shape_of(read[0])
    if len(shape) < 2 or not isinstance(shape[1], sympy.Symbol):
        given = ", ".join(map(str, shape))
        expected = f"the sequence must be axis 1 of {read[0].name} and vary: capture it as dynamic"
        return Refusal(f"{expected}; its shape is [{given}]", read[0])
    if not isinstance(shape[0], sympy.Symbol) and shape[0] != 1:
        reason = f"the batch of {read[0].name} is fixed at {shape[0]}: a step runs all rows as a batch of 1"
        return Refusal(reason, read[0])
    return read[0]


def _unproved_mask(node: fx.Node) -> Refusal | None:
    """The attention that reads `node` in its mask, if that is all that `node` is for: what pairs positions there is
    right, but no proof has reduced it to causal or a window."""
    seen, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            if "mask_name" in user.meta:
                if user.args[3] not in seen:
                    return None
                name, proof = user.meta["mask_name"], user.meta["mask_proof"]
                kind = (
                    "attention without a causal mask"
                    if user.args[4] == "none"
                    else "attention with a tensor mask"
                )
                return Refusal(f"{kind}, it is {name}: {proof}", user)
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def describe_refusal(refusal: Refusal) -> str:
    """`reason (node = op at source line)`, for people."""
    node = refusal.node
    if node is None:
        return refusal.reason
    return f"{refusal.reason} ({node.name} = {node.target} at {source_line(node)})"


def op_name(node: fx.Node) -> str:
    """`aten.mean.dim` for a call."""
    return str(node.target)


def _find_logits(program: Program, scope: Scope) -> fx.Node | Refusal:
    """The one output that follows the tokens; constants such as None may stand beside it."""
    found = [value for value in program.outputs if isinstance(value, fx.Node)]
    if len(found) != 1:
        return Refusal(f"one output, the logits, is expected; the graph returns {len(found)}", None)
    along = scope.of(found[0])
    if along is None or not along.tokens or along.axis != 1 or not scope.is_whole(found[0], 1):
        return Refusal("the output has no sequence at axis 1, one entry per token", found[0])
    return found[0]


def _follow(scope: Scope, node: fx.Node, rule_of: RuleOf) -> Along | None:
    """The sequence axis of one node; None for a uniform value."""
    shapes = _shapes(node)
    if not shapes:
        return None  # a size
    length = next((source for source in node.all_input_nodes if _is_length(scope, source)), None)
    touched = any(scope.of(source) is not None for source in node.all_input_nodes)
    grows = any(scope.follows(size) for shape in shapes for size in shape)
    rule = rule_of(node)
    varies = f"{op_name(node)} takes the sequence length as a number, which changes with every token"
    if not touched and not grows:
        if length is not None:
            raise Mixes(varies)
        return None
    try:
        if rule is None:
            raise Mixes(f"no rule shows that {op_name(node)} keeps the positions of the sequence apart")
        if length is not None and not rule.sizes:
            raise Mixes(varies)
        found = rule.apply(scope, node)
    except Mixes:
        line = _as_line(scope, node, shapes)
        if line is None:
            raise
        found = line
    if found is None:
        return None
    _check_axes(scope, node, shapes, found)
    return found


def _as_line(scope: Scope, node: fx.Node, shapes: list[tuple[Expr, ...]]) -> Along | None:
    """A node without tokens whose value is proved to be a line of the position; it is remembered as a source."""
    if len(shapes) != 1 or any((along := scope.of(s)) and along.tokens for s in node.all_input_nodes):
        return None
    axes = [axis for axis, size in enumerate(shapes[0]) if scope.follows(size)]
    line = scope.line(node, axes[0]) if len(axes) == 1 else None
    if line is None:
        return None
    if line.slope:
        scope.sources.append(PositionSource(node, line))
    return Along(axes[0], tokens=False)


def _check_axes(scope: Scope, node: fx.Node, shapes: list[tuple[Expr, ...]], found: Along) -> None:
    """A rule that names an axis which is not the only one that follows the length would be wrong: Mixes."""
    for shape in shapes:
        axes = [axis for axis, size in enumerate(shape) if scope.follows(size)]
        if axes != [found.axis]:
            raise Mixes(
                f"{op_name(node)} has the sequence on axes {axes}: pairs of positions, or parts of them"
            )


def _shapes(node: fx.Node) -> list[tuple[Expr, ...]]:
    """Shapes of the tensors that a node gives."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [tuple(map(dim_key, part.shape)) for part in values if isinstance(part, torch.Tensor)]


def _is_length(scope: Scope, source: fx.Node) -> bool:
    """Is this a number that depends on the sequence length?"""
    value = source.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and scope.follows(value.node.expr)
