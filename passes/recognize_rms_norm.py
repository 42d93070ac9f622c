"""Name RMS normalization that the source model spells out.

before:  x * rsqrt(mean(x * x, -1, keepdim) + eps), or x / sqrt(...); then w * that
after:   rms_norm(x, [features], w, eps); casts around it (half precision models compute in float32) stay as
         nodes
why:     one reduction kernel instead of six nodes, and a prologue that a linear can swallow
legal:   the mean is over exactly the last axis, kept, of fixed size; eps is a constant number; the mean is
         of the square of the x that is scaled; the weight is a constant with one number per feature and in
         the dtype of x
source:  Zhang and Sennrich, Root Mean Square Layer Normalization (2019)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    constant_number,
    dtype_of,
    is_call,
    is_last_axis,
    is_tensor,
    operands,
    same_shape,
    shape_of,
)
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

NAME: Final = "recognize_rms_norm"
EXACTNESS: Exactness = "reassoc"


@dataclass(frozen=True)
class InverseRoot:
    """`scaled` times 1 / sqrt(mean(square) + eps)."""

    scaled: fx.Node
    mean: fx.Node
    eps: object


def match_inverse_root(node: fx.Node) -> InverseRoot | None:
    """x * rsqrt(m + eps) or x / sqrt(m + eps) with m = mean(...); None if `node` is neither."""
    pair = operands(node)
    if pair is None:
        return None
    orders = (pair, pair[::-1]) if is_call(node, aten.mul.Tensor) else (pair,)
    root = aten.rsqrt.default if is_call(node, aten.mul.Tensor) else aten.sqrt.default
    for scaled, inverse in orders:
        if not is_call(inverse, root):
            continue
        total: Any = inverse.args[0]
        if not is_call(total, aten.add.Tensor) or total.kwargs:
            continue
        for mean, eps in (total.args, tuple(reversed(total.args))):
            if is_call(mean, aten.mean.dim):
                return InverseRoot(scaled, mean, eps)
    return None


def check_mean(graph_module: fx.GraphModule, found: InverseRoot, node: fx.Node) -> Refusal | None:
    """The clauses that root mean square and layer normalization share: axis, size and eps."""
    source: Any = found.mean.args[0]
    if not is_last_axis(source, argument(found.mean, 1, "dim")) or not argument(
        found.mean, 2, "keepdim", False
    ):
        return Refusal("the mean is not over exactly the last axis, kept", node)
    if not isinstance(shape_of(found.scaled)[-1], int):
        return Refusal("the number of features is not fixed", node)
    if constant_number(graph_module, found.eps) is None:
        return Refusal("what is added to the mean is not a constant number", node)
    return None


def squared(node: object) -> fx.Node | None:
    """x for x * x."""
    pair = operands(node) if is_call(node, aten.mul.Tensor) and isinstance(node, fx.Node) else None
    return pair[0] if pair is not None and pair[0] is pair[1] else None


def is_feature_weight(weight: object, node: fx.Node) -> bool:
    """A constant with one number per feature of `node`, in its dtype."""
    return (
        isinstance(weight, fx.Node)
        and weight.op == "get_attr"
        and is_tensor(weight)
        and shape_of(weight) == shape_of(node)[-1:]
        and dtype_of(weight) == dtype_of(node)
    )


def _normalize(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    found = match_inverse_root(node)
    if found is None or squared(found.mean.args[0]) is None:
        return None
    refusal = check_mean(graph_module, found, node)
    if refusal is not None:
        return refusal
    x = squared(found.mean.args[0])
    # T5 scales the half precision tensor by a float32 root: promotion makes that the cast of it, which is
    # squared.
    is_cast = is_call(x, aten._to_copy.default) and x is not None and x.args[0] is found.scaled
    if x is None or not (x is found.scaled or (is_cast and dtype_of(x) == dtype_of(node))):
        return Refusal("the mean is of the square of another tensor than the one that is scaled", node)
    eps = constant_number(graph_module, found.eps)
    return Spelling(aten.rms_norm.default, (x, [shape_of(x)[-1]], None, eps))


def _weigh(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """w * rms_norm(x)."""
    for normalized, weight in (node.args, tuple(reversed(node.args))):
        if not is_call(normalized, aten.rms_norm.default) or node.kwargs:
            continue
        assert isinstance(normalized, fx.Node)
        if (
            not isinstance(weight, fx.Node)
            or weight.op != "get_attr"
            or argument(normalized, 2, "weight") is not None
        ):
            continue
        keeps = same_shape(normalized, node) and dtype_of(normalized) == dtype_of(node)
        if not is_feature_weight(weight, node) or not keeps:
            return Refusal("the weight is not one number per feature in the dtype of the norm", node)
        x, features = normalized.args[:2]
        return Spelling(aten.rms_norm.default, (x, features, weight, argument(normalized, 3, "eps")))
    return None


def _product(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | fx.Node | Refusal | None:
    found = _normalize(graph_module, node)
    return found if found is not None else _weigh(graph_module, node)


RULES: Final[dict[Target, Rule]] = {aten.mul.Tensor: _product, aten.div.Tensor: _normalize}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Products that normalize, and products of a norm with its weight."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the product as a norm."""
    apply_rule(graph_module, site, NAME)
