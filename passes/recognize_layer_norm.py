"""Name layer normalization that the source model spells out.

before:  d = x - mean(x, -1, keepdim); d * rsqrt(mean(d * d, -1, keepdim) + eps), or d / sqrt(...); then *
         w; then + b
after:   layer_norm(x, [features], w, b, eps)
why:     one reduction kernel instead of eight nodes
legal:   both means are over exactly the last axis, kept, of fixed size; eps is a constant number; the mean
         of squares is of the d that is scaled; weight and bias are constants with one number per feature in
         the dtype of x
source:  Ba, Kiros and Hinton, Layer Normalization (2016)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    constant_number,
    dtype_of,
    is_call,
    is_last_axis,
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
from torchweld.passes.recognize_rms_norm import check_mean, is_feature_weight, match_inverse_root, squared

NAME: Final = "recognize_layer_norm"
EXACTNESS: Exactness = "reassoc"


def _normalize(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    found = match_inverse_root(node)
    if found is None or squared(found.mean.args[0]) is None:
        return None
    centred = found.scaled
    x = _centred(centred)
    if x is None:
        return None
    refusal = check_mean(graph_module, found, node)
    if refusal is not None:
        return refusal
    if squared(found.mean.args[0]) is not centred:
        return Refusal("the variance is of another tensor than the one that is scaled", node)
    average: Any = centred.args[1]
    if not is_last_axis(x, argument(average, 1, "dim")) or not argument(average, 2, "keepdim", False):
        return Refusal("the mean that is subtracted is not over exactly the last axis, kept", node)
    eps = constant_number(graph_module, found.eps)
    return Spelling(aten.layer_norm.default, (x, [shape_of(x)[-1]], None, None, eps))


def _centred(node: fx.Node) -> fx.Node | None:
    """x for x - mean(x)."""
    pair = operands(node) if is_call(node, aten.sub.Tensor) else None
    if pair is None or not is_call(pair[1], aten.mean.dim) or pair[1].args[0] is not pair[0]:
        return None
    return pair[0]


def _affine(place: int) -> Rule:
    """layer_norm(x) * w (place 2) or layer_norm(x, w) + b (place 3)."""

    def rule(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        for normalized, vector in (node.args, tuple(reversed(node.args))):
            if not is_call(normalized, aten.layer_norm.default) or not isinstance(vector, fx.Node):
                continue
            assert isinstance(normalized, fx.Node)
            later = [
                argument(normalized, taken, name)
                for taken, name in ((2, "weight"), (3, "bias"))
                if taken >= place
            ]
            if vector.op != "get_attr" or any(entry is not None for entry in later):
                continue
            keeps = same_shape(normalized, node) and dtype_of(normalized) == dtype_of(node)
            if not is_feature_weight(vector, node) or not keeps:
                return Refusal("the vector is not one number per feature in the dtype of the norm", node)
            args = [normalized.args[0], normalized.args[1], *(argument(normalized, at, "") for at in (2, 3))]
            args[place] = vector
            return Spelling(aten.layer_norm.default, (*args, argument(normalized, 4, "eps", 1e-5)))
        return None

    return rule


def _product(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | fx.Node | Refusal | None:
    found = _normalize(graph_module, node)
    return found if found is not None else _affine(2)(graph_module, node)


RULES: Final[dict[Target, Rule]] = {
    aten.mul.Tensor: _product,
    aten.div.Tensor: _normalize,
    aten.add.Tensor: _affine(3),
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Products that normalize, and what is applied to a norm."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the anchor as a norm."""
    apply_rule(graph_module, site, NAME)
