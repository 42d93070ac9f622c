"""Sequence-axis analysis: which axis of each value is the sequence, and does a position depend on others?

    found = walk_sequence(program, rule_of)    # canonicalised and recognised; rules in `sequence_rules`
    found.along[node]                          # Along(axis=1, tokens=True)
    found.attentions, found.sources, found.tables, found.limit

Every value is *uniform* (no sequence axis), or *along* one axis on which position t depends on position t of its
operands alone. Only attention with a proved causal or window mask, causal convolutions, running values (cumsum and its
kin) and scans may look back, and only position sources (what an arange or a slice of a table gives) may depend on where
t is; both are listed, so that a rewrite can give them a past. Any other op is refused with its node: nothing here is
inferred from examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from torchweld.graph.match import dim_key, shape_of
from torchweld.graph.position_rules import make_prover
from torchweld.graph.positions import BATCH, HEAD, QUERY, Extents, Prover, Unprovable
from torchweld.graph.program import Program, source_line
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence_inputs import check_tokens, read_inputs

Expr = Any  # sympy has no stubs


class Mixes(Exception):
    """A position of this node depends on others in a way that has no state rule; the text says how.

    node: the one to blame, where it is not the one that is looked at.
    """

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.node = node


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
class Placed:
    """A value without tokens: which of its axes counts rows (the position of a query), and which counts keys."""

    node: fx.Node
    row: int | None
    key: int | None


@dataclass(frozen=True)
class SequenceAnalysis:
    """What a causal program does with its sequence axis.

    tokens: the input with the sequence at axis 1, whose size is `symbol`; axis 0 is the `batch`, which is 1 or varies.
    along: every value with a sequence axis.
    attentions, carried: what looks back, each in graph order; carried are causal convolutions, running values and scans
    (graph/sequence_states.py, sequence_scans.py).
    key_masks: masks that depend on the key's position alone (ALiBi), by attention.
    pair_masks: masks of two positions (a bias by distance), each with what it is made of (graph/sequence_pairs.py).
    crosses: attentions to an encoder, in graph order.  encoded: what they read of it (graph/sequence_encoder.py).
    limit: the positions that tables and capture allow, None for no limit.  token_limit: rows of the smallest table that
    the tokens index, None where they index none.  logits: the output.
    """

    tokens: fx.Node
    batch: Expr
    symbol: Expr
    along: Mapping[fx.Node, Along]
    attentions: tuple[fx.Node, ...]
    carried: tuple[fx.Node, ...]
    key_masks: Mapping[fx.Node, fx.Node]
    sources: tuple[PositionSource, ...]
    tables: tuple[PositionTable, ...]
    limit: int | None
    token_limit: int | None
    logits: fx.Node
    pair_masks: Mapping[fx.Node, tuple[Placed, ...]]
    crosses: tuple[fx.Node, ...]
    encoded: tuple[fx.Node, ...]

    @property
    def looking_back(self) -> tuple[fx.Node, ...]:
        """Attentions and what else carries a state, in graph order."""
        return tuple(sorted((*self.attentions, *self.carried)))


@dataclass
class Scope:
    """What the rules of `sequence_rules` ask and tell while the graph is walked."""

    graph_module: fx.GraphModule
    tokens: fx.Node
    symbol: Expr
    prover: Prover
    along: dict[fx.Node, Along] = field(default_factory=dict)
    attentions: list[fx.Node] = field(default_factory=list)
    carried: list[fx.Node] = field(default_factory=list)
    key_masks: dict[fx.Node, fx.Node] = field(default_factory=dict)
    sources: list[PositionSource] = field(default_factory=list)
    tables: list[PositionTable] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    token_limits: list[int] = field(default_factory=list)
    pair_masks: dict[fx.Node, tuple[Placed, ...]] = field(default_factory=dict)
    crosses: list[fx.Node] = field(default_factory=list)
    encoded: dict[fx.Node, None] = field(default_factory=dict)
    encoder: set[fx.Node] = field(default_factory=set)
    """Values that depend on other inputs than the tokens, and not on the tokens."""
    set_aside: dict[fx.Node, Mixes] = field(default_factory=dict)
    """Values without tokens that mix positions: only the mask of an attention may be made of them."""

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
NoteEncoder = Callable[[Scope, fx.Node, Along | None], None]


def walk_sequence(
    program: Program, rule_of: RuleOf, note_encoder: NoteEncoder, tokens: fx.Node
) -> SequenceAnalysis | Refusal:
    """Walk `program` with the rule that `rule_of` gives per node; the first node that mixes positions refuses.

    tokens: the input that is the sequence; what the others alone decide is an encoder's, which `note_encoder` notes.
    """
    others = {node for node in read_inputs(program) if node is not tokens}
    able = check_tokens(tokens, others)
    if isinstance(able, Refusal):
        return able
    batch, symbol = shape_of(tokens)[:2]
    prover = make_prover(program.graph_module, Extents(batch, sympy.Integer(1), symbol, symbol))
    scope = Scope(
        program.graph_module, tokens, symbol, prover, {tokens: Along(1, tokens=True)}, encoder=set(others)
    )
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            found = _follow(scope, node, rule_of)
            note_encoder(scope, node, found)
        except Mixes as problem:
            if _set_aside(scope, node, problem):
                continue
            blamed = problem.node or node
            return _unproved_mask(blamed) or Refusal(str(problem), blamed)
        if found is not None:
            scope.along[node] = found
    logits = _find_logits(program, scope)
    if isinstance(logits, Refusal):
        return logits
    if not scope.attentions and not scope.carried:
        reason = "there is no attention, causal convolution, cumulative sum or scan: nothing would be cached"
        return Refusal(reason, logits)
    mine = [size for size in program.sizes if size.dim == 1 and (not others or size.input == tokens.name)]
    highest = [size.high for size in mine if size.high is not None]
    limit = min([*scope.limits, *highest], default=None)
    return SequenceAnalysis(
        tokens, batch, symbol, scope.along, tuple(scope.attentions), tuple(scope.carried), scope.key_masks,
        tuple(scope.sources), tuple(scope.tables), limit, min(scope.token_limits, default=None), logits,
        scope.pair_masks, tuple(scope.crosses), tuple(scope.encoded),
    )  # fmt: skip


def _set_aside(scope: Scope, node: fx.Node, problem: Mixes) -> bool:
    """Leave a value without tokens that mixes positions to the attention that reads it, if one does."""
    if is_attention(node) or any((along := scope.of(s)) and along.tokens for s in node.all_input_nodes):
        return False
    scope.set_aside[node] = problem if problem.node is not None else Mixes(str(problem), node)
    return True


def is_attention(node: fx.Node) -> bool:
    """Is this an attention, recognised by passes/recognize_attention.py?"""
    return node.target is torch.ops.torchweld.attention.default


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
    values = [value for value in program.outputs if isinstance(value, fx.Node)]
    found = [value for value in values if value not in scope.encoder]
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
    aside = next(
        (scope.set_aside[source] for source in node.all_input_nodes if source in scope.set_aside), None
    )
    touched = aside is not None or any(scope.of(source) is not None for source in node.all_input_nodes)
    grows = any(scope.follows(size) for shape in shapes for size in shape)
    rule = rule_of(node)
    varies = f"{op_name(node)} takes the sequence length as a number, which changes with every token"
    if not touched and not grows:
        if length is not None:
            raise Mixes(varies)
        return None
    try:
        if aside is not None and not is_attention(node):
            raise aside
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
    if not isinstance(node.meta.get("val"), torch.Tensor) or any(
        (along := scope.of(s)) and along.tokens for s in node.all_input_nodes
    ):
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
