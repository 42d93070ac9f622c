"""Name rotary position embedding.

before:  x * cos + cat(-x[R/2:], x[:R/2]) * sin; the interleaved form with stack(-x[1::2], x[::2]);
         cat(x1 * c - x2 * s, x2 * c + x1 * s) on the halves of x; cat(rotated x[:R], x[R:])
after:   torchweld::rope(x, cos, sin, interleaved)
why:     seven nodes that read x twice become one that a projection can swallow, and the KV cache derivation
         must know what depends on the position
legal:   halves or pairs of exactly the x that is multiplied by cos, over the whole last axis, of fixed even
         size; cos and sin do not widen x and have the same last axis; the dtype is what rope promotes to
source:  Su et al., RoFormer (2021)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    MAX_INDEX,
    argument,
    aten,
    dtype_of,
    is_call,
    is_tensor,
    operands,
    rank_of,
    same_shape,
    shape_of,
)
from torchweld.graph.ops import rope as rope_op
from torchweld.graph.rewrite import (
    Exactness,
    Refusal,
    Rule,
    RuleSite,
    Spelling,
    Target,
    apply_rule,
    check_rule,
    find_by_rules,
)

NAME: Final = "recognize_rope"
EXACTNESS: Exactness = "exact"

ROPE: Final = torch.ops.torchweld.rope.default
OPERATOR_FILE: Final = rope_op.__name__  # importing it is what registers ROPE


def last_axis_slice(node: object) -> tuple[fx.Node, int, int, int] | None:
    """(x, start, end, step) for x[..., start:end:step] with literal bounds; "to the end" is the size."""
    if not is_call(node, aten.slice.Tensor) or not isinstance(node, fx.Node):
        return None
    x, axis, start, end = node.args[0], node.args[1], argument(node, 2, "start", 0), argument(node, 3, "end")
    step = argument(node, 4, "step", 1)
    if not isinstance(x, fx.Node) or axis not in (-1, rank_of(x) - 1):
        return None
    size = shape_of(x)[-1]
    end = size if end is None or end == MAX_INDEX else end
    if not (
        isinstance(start, int) and isinstance(end, int) and isinstance(size, int) and isinstance(step, int)
    ):
        return None
    return x, start, min(end, size), step


def _negated(node: object) -> Any:
    return node.args[0] if is_call(node, aten.neg.default) and isinstance(node, fx.Node) else None


def _pieces(node: object, target: Target) -> Sequence[Any] | None:
    """Two pieces joined along the last axis by `target` (cat or stack)."""
    if not is_call(node, target) or not isinstance(node, fx.Node):
        return None
    parts: Any = node.args[0]
    axis = argument(node, 1, "dim", 0)
    return parts if len(parts) == 2 and axis in (-1, rank_of(node) - 1) else None


def match_rotation(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """(x, interleaved) if `node` is rot(x) of torchweld::rope."""
    interleaved = is_call(node, aten.reshape.default)
    parts = _pieces(node.args[0], aten.stack.default) if interleaved else _pieces(node, aten.cat.default)
    if parts is None:
        return None
    first, second = last_axis_slice(_negated(parts[0])), last_axis_slice(parts[1])
    if first is None or second is None or first[0] is not second[0]:
        return None
    x = first[0]
    size = shape_of(x)[-1]
    if not same_shape(x, node) or size % 2:
        return None
    half = size // 2
    expected = ((1, size, 2), (0, size, 2)) if interleaved else ((half, size, 1), (0, half, 1))
    return (x, interleaved) if (first[1:], second[1:]) == expected else None


def _sum(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """x * cos + rot(x) * sin."""
    terms = operands(node)
    if terms is None or not all(is_call(term, aten.mul.Tensor) for term in terms):
        return None
    for straight, turned in (terms, terms[::-1]):
        pair = operands(turned)
        for rotated, sin in (pair, pair[::-1]) if pair is not None else ():
            found = match_rotation(rotated)
            if found is None:
                continue
            x, interleaved = found
            factors = operands(straight)
            if factors is None or x not in factors:
                return Refusal("the rotated tensor is not the one that is multiplied by cos", node)
            cos = factors[1] if factors[0] is x else factors[0]
            return _check_tables(node, x, cos, sin) or Spelling(ROPE, (x, cos, sin, interleaved))
    return None


def _check_tables(node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node) -> Refusal | None:
    if not same_shape(x, node):
        return Refusal("cos or sin widen x", node)
    if not shape_of(cos) or not shape_of(sin) or {shape_of(cos)[-1], shape_of(sin)[-1]} != {shape_of(x)[-1]}:
        return Refusal("cos and sin do not have one entry per rotated feature", node)
    promoted = torch.promote_types(torch.promote_types(dtype_of(x), dtype_of(cos)), dtype_of(sin))
    if promoted != dtype_of(node):
        return Refusal("the dtype is not what rope promotes to", node)
    return None


def _join(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """cat of a rotated head and the rest, or of two rotated halves."""
    parts = _pieces(node, aten.cat.default)
    if parts is None:
        return None
    if is_call(parts[0], ROPE):
        return _partial(node, parts[0], parts[1])
    return _halves(node, parts)


def _partial(node: fx.Node, turned: fx.Node, rest: object) -> Spelling | Refusal | None:
    head, tail = last_axis_slice(turned.args[0]), last_axis_slice(rest)
    if head is None or tail is None:
        return None
    x, rotated = head[0], head[2]
    if head != (x, 0, rotated, 1) or tail != (x, rotated, shape_of(x)[-1], 1):
        return Refusal("what is joined to the rotated features is not the rest of the same tensor", node)
    if dtype_of(turned) != dtype_of(node):
        return Refusal("the dtype is not what rope promotes to", node)
    return Spelling(ROPE, (x, *turned.args[1:]))


def _halves(node: fx.Node, parts: Sequence[Any]) -> Spelling | Refusal | None:
    """cat(x1 * c - x2 * s, x2 * c + x1 * s); the tables are doubled to rope's form."""
    low, high = (_cross(part, op) for part, op in zip(parts, (aten.sub.Tensor, aten.add.Tensor), strict=True))
    if low is None or high is None:
        return None
    for x1, cos, x2, sin in low:
        if (x2, cos, x1, sin) not in high and (x1, sin, x2, cos) not in high:
            continue
        first, second = last_axis_slice(x1), last_axis_slice(x2)
        if first is None or second is None or first[0] is not second[0]:
            continue
        x = first[0]
        size = shape_of(x)[-1]
        if first[1:] != (0, size // 2, 1) or second[1:] != (size // 2, size, 1) or size % 2:
            return Refusal("the rotated pieces are not the two halves of one tensor", node)
        doubled = [Spelling(aten.cat.default, ([table, table], -1)) for table in (cos, sin)]
        if not same_shape(x, node) or {shape_of(cos)[-1:], shape_of(sin)[-1:]} != {(size // 2,)}:
            return Refusal("cos and sin do not have one entry per rotated feature", node)
        promoted = torch.promote_types(torch.promote_types(dtype_of(x), dtype_of(cos)), dtype_of(sin))
        if promoted != dtype_of(node):
            return Refusal("the dtype is not what rope promotes to", node)
        return Spelling(ROPE, (x, *doubled, False))
    return None


def _cross(node: object, target: Target) -> list[tuple[fx.Node, fx.Node, fx.Node, fx.Node]] | None:
    """Every reading of a*b op c*d as (a, b, c, d) with a and c the slices."""
    pair = operands(node) if is_call(node, target) and isinstance(node, fx.Node) else None
    if pair is None or not all(is_call(term, aten.mul.Tensor) for term in pair):
        return None
    left, right = (operands(term) for term in pair)
    if left is None or right is None:
        return None
    return [(a, b, c, d) for a, b in (left, left[::-1]) for c, d in (right, right[::-1]) if is_tensor(a)]


RULES: Final[dict[Target, Rule]] = {aten.add.Tensor: _sum, aten.cat.default: _join}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Sums and concatenations that rotate."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the anchor as a rope."""
    apply_rule(graph_module, site, NAME)
