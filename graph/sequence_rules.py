"""What every op does to the sequence axis: the rules of `sequence.walk_sequence`.

A rule returns the sequence axis of its result if position t of it depends on position t of the operands alone, and
raises Mixes otherwise. Attention may look back: it is noted as a state. So may what `sequence_states` and
`sequence_scans` have rules for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Final

import sympy
import torch
from torch import fx

from torchweld.graph.match import argument, aten, rank_of, shape_of
from torchweld.graph.ops import dequantize as dequantize_op
from torchweld.graph.ops import rope as rope_op
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence import (
    Along,
    Mixes,
    PositionTable,
    Rule,
    Scope,
    SequenceAnalysis,
    op_name,
    walk_sequence,
)
from torchweld.graph.sequence_attention import ATTENTION, attention_rule
from torchweld.graph.sequence_encoder import choose_tokens, note_encoder
from torchweld.graph.sequence_inputs import find_tokens
from torchweld.graph.sequence_scans import SCAN_RULES, scan_rule
from torchweld.graph.sequence_states import STATE_RULES

# Importing these is what registers the ops.
OPERATOR_FILES: Final = (dequantize_op.__name__, rope_op.__name__)


def analyse_sequence(program: Program, tokens: str | None = None) -> SequenceAnalysis | Refusal:
    """What a canonicalised and recognised program does with its sequence axis, or the node that mixes positions.

    tokens: the input that is the sequence; without it the one for which the analysis succeeds. The others belong to
    an encoder then, and tokens meet them in cross attention.
    """
    found = find_tokens(program, tokens)
    if isinstance(found, Refusal):
        return found
    results = {node: walk_sequence(program, rule_of, note_encoder, node) for node in found}
    return choose_tokens(results)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call; ops that torch tags as pointwise need none of their own."""
    rule = RULES.get(node.target) or scan_rule(node)
    if rule is None and isinstance(node.target, torch._ops.OpOverload):
        return POINTWISE if torch.Tag.pointwise in node.target.tags else None
    return rule


def _aligned(scope: Scope, node: fx.Node, operands: Iterable[object]) -> Along:
    """Operands broadcast against the result from the right: all sequence axes must fall on one."""
    rank = rank_of(node)
    axes: set[int] = set()
    tokens = False
    for operand in operands:
        along = scope.of(operand)
        if along is None or not isinstance(operand, fx.Node):
            continue
        axes.add(along.axis + rank - rank_of(operand))
        tokens |= along.tokens
    if len(axes) != 1:
        raise Mixes(f"{op_name(node)} pairs every position with every other")
    return Along(axes.pop(), tokens)


def _pointwise(scope: Scope, node: fx.Node) -> Along:
    return _aligned(scope, node, node.all_input_nodes)


def _uniform(scope: Scope, node: fx.Node) -> Along | None:
    """A factory: the same number everywhere. What it is called on gives it dtype and device only."""
    axes = scope.axes(node)
    if not axes:
        return None
    if len(axes) != 1:
        raise Mixes(f"{op_name(node)} makes pairs of positions")
    return Along(axes[0], tokens=False)


def _expand(scope: Scope, node: fx.Node) -> Along | None:
    return _uniform(scope, node) if scope.of(node.args[0]) is None else _aligned(scope, node, node.args[:1])


def _like(scope: Scope, node: fx.Node) -> Along:
    return Along(_source(scope, node)[1].axis, tokens=False)


def _embedding(scope: Scope, node: fx.Node) -> Along:
    table, places = node.args[0], node.args[1]
    along = scope.of(places)
    if scope.of(table) is not None or along is None or not isinstance(places, fx.Node):
        raise Mixes(f"{op_name(node)} looks up a table that depends on the sequence")
    _note_limit(scope, table, places, along)
    if places is scope.tokens and isinstance(table, fx.Node):
        scope.token_limits.append(int(shape_of(table)[0]))
    return along


def _index(scope: Scope, node: fx.Node) -> Along:
    """table[i, j, ...] with constant table: position by position."""
    table: Any = node.args[0]
    places: Any = node.args[1]
    if scope.of(table) is not None or any(place is None for place in places):
        raise Mixes(f"{op_name(node)} picks positions of the sequence by index")
    lead = max(rank_of(place) for place in places)
    found = {
        along.axis + lead - rank_of(place): along
        for place in places
        if (along := scope.of(place)) is not None
    }
    if len(found) != 1:
        raise Mixes(f"{op_name(node)} pairs every position with every other")
    ((axis, along),) = found.items()
    if len(places) == 1:
        _note_limit(scope, table, places[0], along)
    return Along(axis, along.tokens)


def _index_select(scope: Scope, node: fx.Node) -> Along:
    table: Any = node.args[0]
    places: Any = node.args[2]
    along = scope.of(places)
    if scope.of(table) is not None or along is None or node.args[1] != 0:
        raise Mixes(f"{op_name(node)} picks positions of the sequence by index")
    _note_limit(scope, table, places, along)
    return along


def _note_limit(scope: Scope, table: object, places: fx.Node, along: Along) -> None:
    """A table that is read at positions ends somewhere."""
    line = None if along.tokens else scope.line(places, along.axis)
    if line is not None and line.slope == 1 and isinstance(table, fx.Node):
        scope.limits.append(int(shape_of(table)[0]) - line.first)


def _source(scope: Scope, node: fx.Node) -> tuple[fx.Node, Along]:
    """The first operand, which has the sequence; Mixes where another operand has it too."""
    source: Any = node.args[0]
    along = scope.of(source)
    if along is None or any(
        scope.of(other) is not None for other in node.all_input_nodes if other is not source
    ):
        raise Mixes(f"{op_name(node)} has weights or bounds that depend on the sequence")
    return source, along


def _linear(scope: Scope, node: fx.Node) -> Along:
    source, along = _source(scope, node)
    if along.axis == rank_of(source) - 1:
        raise Mixes(f"{op_name(node)} sums over the sequence axis: a later token changes earlier outputs")
    return along


def _dequantize(scope: Scope, node: fx.Node) -> Along:
    """Stored rows [..., bytes] become [..., columns], row by row."""
    source, along = _source(scope, node)
    if along.axis == rank_of(source) - 1:
        raise Mixes(f"{op_name(node)} decodes bytes that follow the sequence")
    return along


def _matmul(scope: Scope, node: fx.Node) -> Along:
    """[..., M, K] @ [..., K, N]: K may not be the sequence, and only one of M, N and the batch may be."""
    left: Any = node.args[0]
    right: Any = node.args[1]
    first, second = scope.of(left), scope.of(right)
    if rank_of(left) < 2 or rank_of(right) < 2:
        raise Mixes(f"{op_name(node)} of a vector with the sequence")
    if (first and first.axis == rank_of(left) - 1) or (second and second.axis == rank_of(right) - 2):
        raise Mixes(f"{op_name(node)} sums over the sequence axis: a later token changes earlier outputs")
    return _aligned(scope, node, (left, right))


def _norm(scope: Scope, node: fx.Node) -> Along:
    source, along = _source(scope, node)
    shape: Any = node.args[1]
    if along.axis >= rank_of(source) - len(shape):
        raise Mixes(_mixing(node))
    return along


def _dims(node: fx.Node, source: fx.Node, position: int, name: str, default: object) -> list[int]:
    """The dimensions that a call names, counted from the front; all for None or an empty list."""
    rank = rank_of(source)
    given: Any = argument(node, position, name, default)
    chosen = [given] if isinstance(given, int) else given
    return [dim % rank for dim in chosen] if chosen else list(range(rank))


def _keeping(position: int, name: str = "dim", default: object = None) -> Callable[[Scope, fx.Node], Along]:
    """An op over some dimensions whose result has the shape of its source."""

    def apply(scope: Scope, node: fx.Node) -> Along:
        source, along = _source(scope, node)
        if along.axis in _dims(node, source, position, name, default):
            raise Mixes(_mixing(node))
        return along

    return apply


def _reduction(position: int = 1, keep: int = 2, default: object = None) -> Callable[[Scope, fx.Node], Along]:
    """An op that takes some dimensions away, or leaves them at size 1."""

    def apply(scope: Scope, node: fx.Node) -> Along:
        source, along = _source(scope, node)
        dims = _dims(node, source, position, "dim", default)
        if along.axis in dims:
            raise Mixes(_mixing(node))
        gone = 0 if argument(node, keep, "keepdim", False) else sum(dim < along.axis for dim in dims)
        return Along(along.axis - gone, along.tokens)

    return apply


def _mixing(node: fx.Node) -> str:
    """Why an op along the sequence axis has no place in a causal step."""
    name = str(node.target).split(".")[-2]
    if name == "flip":
        return "flip of the sequence axis: position t reads position S - 1 - t, a later token"
    return f"{name} over the sequence axis: a later token changes earlier outputs"


def _reshape(scope: Scope, node: fx.Node) -> Along | None:
    """The axis of the result with the same stride in row-major order that the sequence has as its minor factor."""
    source: Any = node.args[0]
    along = scope.of(source)
    if along is None:
        return _uniform(scope, node)
    stride = sympy.expand(prod(shape_of(source)[along.axis + 1 :]))
    shape = shape_of(node)
    for axis, size in enumerate(shape):
        if scope.follows(size) and sympy.expand(prod(shape[axis + 1 :]) - stride) == 0:
            return Along(axis, along.tokens)
    raise Mixes(f"{op_name(node)} merges the sequence axis with an axis behind it")


def _part(scope: Scope, node: fx.Node) -> Along:
    """One of several results, such as the values of a topk: all have the sequence on the same axis."""
    return _source(scope, node)[1]


def _permute(scope: Scope, node: fx.Node) -> Along:
    source, along = _source(scope, node)
    order: Any = node.args[1]
    return Along([axis % rank_of(source) for axis in order].index(along.axis), along.tokens)


def _slice(scope: Scope, node: fx.Node) -> Along:
    source: Any = node.args[0]
    axis = _dims(node, source, 1, "dim", 0)[0]
    if scope.of(source) is None:
        return _table(scope, node, source, axis)
    source, along = _source(scope, node)
    if axis == along.axis:
        raise Mixes("a part of the sequence axis: which positions it holds changes with every token")
    return along


def _table(scope: Scope, node: fx.Node, table: fx.Node, axis: int) -> Along:
    """table[start : start + S] of a constant. A line, such as stored position ids, is a source instead."""
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    first = 0 if start is None else start
    size = shape_of(table)[axis]
    plain = isinstance(first, int) and first >= 0 and argument(node, 4, "step", 1) == 1
    if not plain or not isinstance(end, fx.Node) or not isinstance(size, int):
        raise Mixes(f"{op_name(node)} takes a part of a table that does not follow the position")
    if scope.axes(node) != [axis] or not scope.is_whole(node, axis):
        raise Mixes(f"{op_name(node)} takes a part of a table that is not one entry per position")
    if scope.line(node, axis) is not None:
        raise Mixes("a line of positions")  # the caller asks for the line again and notes a source
    scope.tables.append(PositionTable(node, axis, int(first)))
    scope.limits.append(size - int(first))
    return Along(axis, tokens=False)


def _select(scope: Scope, node: fx.Node) -> Along | None:
    source, along = _source(scope, node)
    axis = _dims(node, source, 1, "dim", 0)[0]
    if axis == along.axis:
        if all(user.target in SHAPE_ONLY for user in node.users):
            return None  # zeros_like(x[:, 0]), where a scan begins: nothing reads what it holds
        raise Mixes("one position of the sequence axis: which one it is changes with every token")
    return Along(along.axis - (axis < along.axis), along.tokens)


def _cat(scope: Scope, node: fx.Node) -> Along:
    parts: Any = node.args[0]
    axis = int(argument(node, 1, "dim", 0)) % rank_of(node)
    found = {along.axis for part in parts if (along := scope.of(part)) is not None}
    if found != {axis} and len(found) == 1:
        return Along(found.pop(), any(scope.along[part].tokens for part in parts if part in scope.along))
    raise Mixes(f"{op_name(node)} puts other values in front of or behind the positions of the sequence")


def _repeat(scope: Scope, node: fx.Node) -> Along | None:
    source: Any = node.args[0]
    if scope.of(source) is None:
        return _uniform(scope, node)
    found = _aligned(scope, node, (source,))
    times: Any = node.args[1]
    if times[found.axis] != 1:
        raise Mixes(f"{op_name(node)} repeats the sequence")
    return found


SHAPE_ONLY: Final = frozenset({
    aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.new_ones.default,
    aten.new_zeros.default, aten.new_full.default,
})  # fmt: skip
"""What takes shape, dtype and device of its operand, and no value (passes/step_copy.py does not copy the operand)."""
POINTWISE: Final = Rule(_pointwise)
UNIFORM: Final = Rule(_uniform, sizes=True)
LIKE: Final = Rule(_like)


def _named(rule: Rule, *names: str) -> dict[Any, Rule]:
    """`rule` for every overload of these ATen ops."""
    packets = [getattr(aten, name) for name in names]
    return {getattr(packet, overload): rule for packet in packets for overload in packet.overloads()}


RULES: Final[dict[Any, Rule]] = {
    **_named(POINTWISE, "_to_copy", "clone", "alias", "detach", "contiguous", "dropout", "masked_fill"),
    **_named(POINTWISE, "log_sigmoid", "hardswish"),  # torch does not tag them
    **dict.fromkeys((aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf), POINTWISE),
    torch.ops.torchweld.rope.default: POINTWISE,
    **_named(UNIFORM, "ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "scalar_tensor"),
    **_named(LIKE, "ones_like", "zeros_like", "full_like"),
    **_named(Rule(_expand, sizes=True), "expand", "broadcast_to"),
    **_named(Rule(_reshape, sizes=True), "reshape", "view", "_unsafe_view"),
    **_named(Rule(_repeat, sizes=True), "repeat"),
    **_named(Rule(_permute), "permute"),
    aten.slice.Tensor: Rule(_slice, sizes=True),
    aten.select.int: Rule(_select),
    **_named(Rule(_cat), "cat"),
    aten.embedding.default: Rule(_embedding),
    aten.index.Tensor: Rule(_index),
    aten.index_select.default: Rule(_index_select),
    aten.linear.default: Rule(_linear),
    **_named(Rule(_matmul), "matmul", "mm", "bmm"),
    aten.layer_norm.default: Rule(_norm),
    aten.rms_norm.default: Rule(_norm),
    **_named(Rule(_keeping(1)), "softmax", "_softmax", "log_softmax", "_log_softmax"),
    aten.flip.default: Rule(_keeping(1, "dims")),
    aten.roll.default: Rule(_keeping(2, "dims")),
    aten.sort.default: Rule(_keeping(1, default=-1)),
    aten.topk.default: Rule(_keeping(2, default=-1)),
    **_named(
        Rule(_reduction()), "mean", "sum", "amax", "amin", "any", "all", "argmax", "argmin", "logsumexp"
    ),
    operator.getitem: Rule(_part),
    aten.max.dim: Rule(_reduction()),
    aten.min.dim: Rule(_reduction()),
    aten.var.correction: Rule(_reduction(keep=3)),
    aten.std.correction: Rule(_reduction(keep=3)),
    torch.ops.torchweld.dequantize.default: Rule(_dequantize),
    ATTENTION: Rule(attention_rule),
    **STATE_RULES,
    **SCAN_RULES,
}
