"""One spelling for what stands between the scores and the values of an attention.

before:  softmax(s - max(s)); exp(s - max(s)) / sum(exp(s - max(s))), also with the division behind the values;
         (q @ k^T + m) * c; where(m, q @ k^T, -inf) * c; a mask [heads, t, s] on scores [batch, heads, t, s];
         max(q @ k^T + m, lowest), where m hides by the lowest number of its dtype
after:   softmax(s); q @ k^T * c + m * c; where(m, q @ k^T * c, -inf); a mask [1, heads, t, s]
why:     recognize_attention then reads scale, soft cap, masks and softmax in one order
legal:   the maximum and the sum are over the last axis and kept; the exponentials are used by nothing else;
         c is a positive constant; what is scaled leads to a softmax alone, and from a product of two tensors;
         scores are so far below the greatest number of their dtype that adding them to the lowest one rounds to it
source:  canonicalisation as in MLIR; GPT-J and Falcon in transformers scale behind the mask
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    constant_number,
    constant_tensor,
    dtype_of,
    is_call,
    is_last_axis,
    is_tensor,
    only_user,
    operand_and_number,
    rank_of,
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
from torchweld.passes.canonicalize_views import read_sizes
from torchweld.passes.match_attention import PASSED, leads_to_product

NAME: Final = "canonicalize_scores"
EXACTNESS: Exactness = "reassoc"


def _is_over_last(node: object, source: fx.Node, *targets: object) -> bool:
    """Is this a reduction of `source` over its last axis, with the axis kept?"""
    return (
        is_call(node, *targets)
        and isinstance(node, fx.Node)
        and node.args[0] is source
        and is_last_axis(source, argument(node, 1, "dim"))
        and bool(argument(node, 2, "keepdim", False))
    )


def _without_maximum(node: object) -> fx.Node | None:
    """s for s - max(s)."""
    if (
        not is_call(node, aten.sub.Tensor)
        or not isinstance(node, fx.Node)
        or len(node.args) != 2
        or node.kwargs
    ):
        return None
    source, maximum = node.args
    if not isinstance(source, fx.Node):
        return None
    if is_call(maximum, operator.getitem) and isinstance(maximum, fx.Node) and maximum.args[1] == 0:
        return source if _is_over_last(maximum.args[0], source, aten.max.dim) else None
    return source if _is_over_last(maximum, source, aten.amax.default) else None


def _softmax(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    source = _without_maximum(node.args[0])
    if source is None or not is_last_axis(source, argument(node, 1, "dim")):
        return None
    return Spelling(node.target, (source, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]


def _spelled_softmax(weights: object, total: object) -> Spelling | Refusal | None:
    """softmax(s) for weights = exp(s - max(s)) and total = sum(weights)."""
    if not is_call(weights, aten.exp.default) or not isinstance(weights, fx.Node):
        return None
    if not _is_over_last(total, weights, aten.sum.dim_IntList) or argument(total, 3, "dtype") is not None:  # type: ignore[arg-type]
        return None
    source = _without_maximum(weights.args[0])
    if source is None:
        return Refusal(
            "exponentials without their maximum taken off overflow where a softmax does not", weights
        )
    if len(weights.users) != 2:
        return Refusal("the exponentials are used elsewhere", weights)
    return Spelling(aten.softmax.int, (source, -1))


def _divide(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    above, total = node.args
    if not is_call(above, aten.matmul.default) or not isinstance(above, fx.Node):
        return _spelled_softmax(above, total) or _scale(graph_module, node)
    softmax = _spelled_softmax(above.args[0], total)
    if not isinstance(softmax, Spelling):
        return softmax
    if len(above.users) != 1:
        return Refusal("the values mixed without the division are used elsewhere", above)
    return Spelling(aten.matmul.default, (softmax, above.args[1]))


def _scale(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """(s + m) * c, and where(m, s, hidden) * c."""
    found = operand_and_number(graph_module, node, commutative=is_call(node, aten.mul.Tensor))
    if found is None:
        return None
    masked, number = found
    ours = is_call(masked, aten.add.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf)
    if not ours or not leads_to_product(graph_module, masked) or not _leads_to_softmax(node):
        return None
    if number <= 0:
        return Refusal("a mask is scaled by a number that is not positive", node)
    if len(masked.users) != 1:
        return Refusal("the masked scores are used elsewhere", masked)
    if is_call(masked, aten.add.Tensor):
        return _scale_sum(node, masked)
    factor = number if is_call(node, aten.mul.Tensor) else 1 / number
    parts = [
        _scaled(node, part) if is_tensor(part) else _hidden(part, factor, node) for part in masked.args[1:]
    ]
    return Spelling(masked.target, (masked.args[0], *parts))  # type: ignore[arg-type]


def _scale_sum(node: fx.Node, masked: fx.Node) -> Spelling | None:
    if len(masked.args) != 2 or masked.kwargs or not all(is_tensor(part) for part in masked.args):
        return None
    return Spelling(aten.add.Tensor, tuple(_scaled(node, part) for part in masked.args))


def _scaled(node: fx.Node, part: object) -> Spelling:
    """`part` in place of the tensor that `node` scales."""
    first = node.args[0]
    is_first = is_tensor(first) and same_shape(first, node)  # type: ignore[arg-type]
    return Spelling(node.target, (part, node.args[1]) if is_first else (first, part))  # type: ignore[arg-type]


def _hidden(number: Any, factor: float, node: fx.Node) -> float:
    """A hidden score times the factor, as its dtype holds it."""
    scaled = float(number) * factor
    return math.copysign(math.inf, scaled) if abs(scaled) > torch.finfo(dtype_of(node)).max else scaled


def _leads_to_softmax(node: fx.Node) -> bool:
    """Is the only use of `node` a softmax, through what may stand between it and the scores?"""
    user = only_user(node)
    while user is not None and is_call(user, *PASSED, aten.add.Tensor, aten.cat.default):
        user = only_user(user)
    return is_call(user, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


def _mask(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """A mask with heads and without batch gets a batch of one."""
    if len(node.args) != (2 if is_call(node, aten.add.Tensor) else 3) or node.kwargs or rank_of(node) != 4:
        return None
    masks = [part for part in node.args if is_tensor(part) and rank_of(part) == 3]  # type: ignore[arg-type]
    if len(masks) != 1 or not leads_to_product(graph_module, node) or not _leads_to_softmax(node):
        return None
    sizes = read_sizes(graph_module, node, (1, *shape_of(masks[0])))  # type: ignore[arg-type]
    if sizes is None:
        return Refusal("a symbolic size of the mask cannot be read from any node", node)
    wide = Spelling(aten.reshape.default, (masks[0], sizes))
    return Spelling(node.target, tuple(wide if part is masks[0] else part for part in node.args))  # type: ignore[arg-type]


def _clamp(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """max(s + m, lowest) for a mask m that hides by the lowest number of the dtype: there is nothing below it."""
    masked, number = node.args[:2]
    lowest = torch.finfo(dtype_of(node)).min if dtype_of(node).is_floating_point else None
    if lowest is None or constant_number(graph_module, number) != lowest or not is_tensor(masked):
        return None
    if (
        not isinstance(masked, fx.Node)
        or not is_call(masked, aten.add.Tensor)
        or not same_shape(masked, node)
    ):
        return None
    if not leads_to_product(graph_module, masked) or not _leads_to_softmax(node):
        return None
    return masked if any(_hides_by(graph_module, part, lowest) for part in masked.args) else None


def _hides_by(graph_module: fx.GraphModule, mask: object, lowest: float) -> bool:
    """where(visible, zeros, lowest)"""
    if not is_call(mask, aten.where.ScalarOther) or not isinstance(mask, fx.Node) or mask.args[2] != lowest:
        return False
    shown = constant_tensor(graph_module, mask.args[1])
    return shown is not None and bool((shown == 0).all())


RULES: Final[dict[Target, Rule]] = {
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.div.Tensor: _divide,
    aten.mul.Tensor: _scale,
    **dict.fromkeys((aten.max.other, aten.maximum.default), _clamp),
    **dict.fromkeys((aten.add.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf), _mask),
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Softmaxes, their spellings, and what is added to scores or scales them."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the anchor."""
    apply_rule(graph_module, site, NAME)
