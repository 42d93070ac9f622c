"""The parts of an attention: what recognize_attention reads out of a graph, without changing it.

Two spellings are read: `scaled_dot_product_attention`, and matmul - scale - soft cap - masks - softmax -
matmul, walked from the softmax down to the product of query and key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    dtype_of,
    is_call,
    is_tensor,
    operand_and_number,
    rank_of,
    shape_of,
)
from torchweld.graph.rewrite import Refusal
from torchweld.passes.match_heads import Operand, check_heads, key_operand, merge_groups, without_repeats
from torchweld.passes.match_sinks import Sinks, check_cut, read_sinks

NEVER_A_SCORE: Final = -1e9
"""What sources write for "hidden" where they do not write -inf. Beside a visible score above -1e9 + 104 its
exponential is 0 in float32; at such scores float32 steps by 64 and the model has no meaning left."""


NO_HEADS: Final = "query, key and value do not have the axes [batch, heads, positions, features]"


def hidden_below(dtype: torch.dtype) -> float:
    """A score of `dtype` at or below this is hidden."""
    return max(torch.finfo(dtype).min, NEVER_A_SCORE)


@dataclass(frozen=True)
class Mask:
    """One mask on the scores: boolean (True = visible, unless inverted) or numbers that are added.

    `hidden` is the finite number that takes the place of a hidden score where the source writes one instead
    of -inf; a row without any visible key is then uniform, not zero, so it is kept apart.
    """

    node: fx.Node
    inverted: bool = False
    hidden: float | None = None

    @property
    def is_boolean(self) -> bool:
        """Does it choose scores, rather than add to them?"""
        return dtype_of(self.node) == torch.bool


@dataclass(frozen=True)
class Attention:
    """What recognize_attention needs: operands with 3 or 4 axes, the shape [batch, heads, queries, keys] of
    the scores and what is done to them. `top_left`: query t sees the keys up to t, however many there are."""

    query: Operand
    key: Operand
    value: Operand
    shape: tuple[Any, Any, Any, Any]
    scale: float
    soft_cap: float
    masks: tuple[Mask, ...]
    causal: bool = False
    top_left: bool = False
    sinks: Sinks | None = None


def match_sdpa(graph_module: fx.GraphModule, node: fx.Node) -> Attention | Refusal:
    """Read a scaled_dot_product_attention."""
    query, key, value = (part for part in node.args[:3])
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    if argument(node, 4, "dropout_p", 0.0) != 0:
        return Refusal("dropout is training", node)
    ranks = {rank_of(part) for part in (query, key, value)}
    if ranks not in ({3}, {4}):
        return Refusal(NO_HEADS, node)
    features = shape_of(query)[-1]
    scale = argument(node, 6, "scale")
    if scale is None and not isinstance(features, int):
        return Refusal("the number of features is not fixed", node)
    operands = Operand(query), Operand(key), Operand(value)
    batch, *heads = shape_of(query)[:-2]
    shape = (batch, heads[0] if heads else 1, shape_of(query)[-2], shape_of(key)[-2])
    if heads:
        refusal = check_heads(node, *operands, grouped=bool(argument(node, 7, "enable_gqa", False)))
        if refusal is not None:
            return refusal
        operands = operands[0], *without_repeats(*operands[1:])
    elif any(part.shape[0] != batch for part in operands):
        return Refusal("batch sizes of query, key and value differ", node)
    causal = bool(argument(node, 5, "is_causal", False))
    # torch aligns the triangle at the first key, torchweld at the last: equal only for as many keys as queries.
    square = shape[2] == shape[3]
    mask = argument(node, 3, "attn_mask")
    scale = 1 / math.sqrt(features) if scale is None else float(scale)
    masks = (Mask(mask),) if mask is not None else ()
    return Attention(*operands, shape, scale, 0.0, masks, causal and square, causal and not square)


def weights_of(product: fx.Node) -> fx.Node | None:
    """The softmax whose result the left operand of `product` is, through casts, merged heads and cuts."""
    node: Any = product.args[0]
    while is_call(node, aten._to_copy.default, aten.reshape.default, aten.slice.Tensor):
        node = node.args[0]
    return (
        node if is_call(node, aten.softmax.int, aten._softmax.default, aten._safe_softmax.default) else None
    )


def match_naive(graph_module: fx.GraphModule, product: fx.Node) -> Attention | Refusal:
    """Read matmul(softmax(...), value)."""
    softmax = weights_of(product)
    value = product.args[1]
    assert softmax is not None and isinstance(value, fx.Node)
    cut = _check_weights(product, softmax, value)
    if isinstance(cut, Refusal):
        return cut
    scores: Any = softmax.args[0]
    walked = _Walk(graph_module)
    refusal = walked.descend(scores)
    if refusal is None and walked.product is not None:
        refusal = check_cut(cut, walked.product, walked.sinks)
    if refusal is not None:
        return refusal
    assert walked.product is not None
    query, right = walked.product.args
    assert isinstance(query, fx.Node) and isinstance(right, fx.Node)
    key, factor = _key(graph_module, right)
    operands = Operand(query), key, Operand(value)
    if rank_of(query) == 5:
        merged = merge_groups(*operands)
        if merged is None:
            return Refusal(NO_HEADS, product)
        operands = merged
    elif rank_of(query) == 4:
        refusal = check_heads(product, *operands, grouped=False)
        if refusal is not None:
            return refusal
        operands = operands[0], *without_repeats(*operands[1:])
    scale, masks = walked.scale * factor, tuple(walked.masks)
    return Attention(*operands, walked.shape, scale, walked.soft_cap, masks, sinks=walked.sinks)


def _check_weights(product: fx.Node, softmax: fx.Node, value: fx.Node) -> fx.Node | Refusal | None:
    """Clauses on the softmax and what multiplies it; the one slice between them, if there is one."""
    if argument(softmax, 1, "dim") not in (-1, rank_of(softmax) - 1):
        return Refusal("the softmax is not over the keys", softmax)
    node, cut = softmax, None
    while node is not product:
        if len(node.users) != 1:
            return Refusal("the attention weights are used elsewhere", softmax)
        following = next(iter(node.users))
        if is_call(following, aten.reshape.default) and shape_of(following)[-2:] != shape_of(node)[-2:]:
            return Refusal("the attention weights are reshaped beyond batch and heads", following)
        if is_call(following, aten.slice.Tensor):
            if cut is not None:
                return Refusal("the attention weights are cut twice", following)
            cut = following
        node = following
    left: Any = product.args[0]
    if rank_of(value) not in (3, 4, 5) or rank_of(value) != rank_of(left):
        return Refusal(NO_HEADS, product)
    return cut


def _key(graph_module: fx.GraphModule, right: fx.Node) -> tuple[Operand, float]:
    """Key and the constant factor on it, from the right operand [.., d, s] of the scores."""
    scale = 1.0
    scaled = _times_number(graph_module, right)
    while scaled is not None:
        right, scale = scaled[0], scale * scaled[1]
        scaled = _times_number(graph_module, right)
    return key_operand(right), scale


def _times_number(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) for x * c and for x / c, c a constant number."""
    if is_call(node, aten.mul.Tensor):
        return operand_and_number(graph_module, node)
    if is_call(node, aten.div.Tensor):
        found = operand_and_number(graph_module, node, commutative=False)
        return (found[0], 1 / found[1]) if found is not None and found[1] else None
    return None


@dataclass
class _Walk:
    """The way from the softmax down to the product of query and key, and what was met on it."""

    graph_module: fx.GraphModule
    scale: float = 1.0
    soft_cap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    sinks: Sinks | None = None
    shape: tuple[Any, Any, Any, Any] = (1, 1, 1, 1)
    product: fx.Node | None = None

    def descend(self, scores: fx.Node) -> Refusal | None:
        """Walk down; what stands on the way that no attention can express is the refusal."""
        node = scores
        wide: tuple[Any, ...] | None = None
        while not is_call(node, aten.matmul.default):
            if len(node.users) != 1:
                return Refusal("the scores are used elsewhere", node)
            if rank_of(node) == 4:
                wide = shape_of(node)
            following = self._step(node)
            if isinstance(following, Refusal):
                return following
            node = following
        if len(node.users) != 1:
            return Refusal("the scores are used elsewhere", node)
        self.product = node
        if rank_of(node) not in (3, 4, 5):
            return Refusal(NO_HEADS, node)
        if (
            rank_of(node) == 3 and wide is None
        ):  # batch and heads are one axis throughout: the op sees one head
            wide = (shape_of(node)[0], 1, *shape_of(node)[1:])
        if rank_of(node) == 5:
            batch, heads, group, *rest = shape_of(node)
            wide = (batch, heads * group, *rest)
        batch, heads, queries, keys = shape_of(node) if wide is None or rank_of(node) == 4 else wide
        self.shape = (batch, heads, queries, keys)
        return None

    def _step(self, node: fx.Node) -> fx.Node | Refusal:
        """One op further down."""
        below: Any = node.args[0] if node.args else None
        if is_call(node, aten._to_copy.default) and dtype_of(node).is_floating_point and is_tensor(below):
            return below if dtype_of(below).is_floating_point else Refusal("the scores are integers", node)
        if is_call(node, aten.reshape.default):
            if {rank_of(below), rank_of(node)} != {3, 4} or shape_of(below)[-2:] != shape_of(node)[-2:]:
                return Refusal("the scores are reshaped beyond batch and heads", node)
            return below if isinstance(below, fx.Node) else Refusal("the scores have no source", node)
        scaled = _times_number(self.graph_module, node)
        if scaled is not None:
            return self._scale(node, *scaled)
        if is_call(node, aten.cat.default):
            return self._sinks(node)
        if is_call(node, aten.add.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf):
            return self._mask(node)
        return Refusal(f"{node.target} stands between the scores and the softmax", node)

    def _scale(self, node: fx.Node, below: fx.Node, factor: float) -> fx.Node | Refusal:
        if not is_call(below, aten.tanh.default):
            self.scale *= factor
            return below
        if self.scale != 1.0 or self.soft_cap or factor <= 0:
            return Refusal("a soft cap is scaled once more", node)
        if len(below.users) != 1:
            return Refusal("the scores are used elsewhere", below)
        # cap * tanh(y) = cap * tanh(scale * qk / cap) with scale = cap * (what stands below)
        self.soft_cap = factor
        self.scale = factor
        inner = below.args[0]
        return inner if isinstance(inner, fx.Node) else Refusal("the soft cap has no source", node)

    def _sinks(self, node: fx.Node) -> fx.Node | Refusal:
        found = read_sinks(node)
        if isinstance(found, Refusal):
            return found
        if self.masks or self.soft_cap or self.scale != 1.0 or self.sinks is not None:
            return Refusal("a sink stands before the scale, the soft cap, a mask or another sink", node)
        scores, self.sinks = found
        return scores

    def _mask(self, node: fx.Node) -> fx.Node | Refusal:
        found = self._read_mask(node)
        if found is None:
            return Refusal(f"{node.target} stands between the scores and the softmax, and is no mask", node)
        below, mask = found
        if self.scale != 1.0 or self.soft_cap:
            return Refusal("a mask stands before the scale or the soft cap", node)
        if shape_of(below) != shape_of(node):
            return Refusal("a mask widens the scores", node)
        if rank_of(mask.node) == 3 and rank_of(node) == 4:
            return Refusal("a mask has heads but no batch", node)
        if rank_of(mask.node) > 2 and rank_of(node) == 5:
            return Refusal("a mask has an axis of groups", node)
        self.masks.append(mask)
        return below

    def _read_mask(self, node: fx.Node) -> tuple[fx.Node, Mask] | None:
        """(scores below, mask) of an addition or a where."""
        if is_call(node, aten.add.Tensor):
            if len(node.args) != 2 or node.kwargs or not all(is_tensor(part) for part in node.args):
                return None
            first, second = node.args
            assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
            if leads_to_product(self.graph_module, first):
                return first, Mask(second)
            return (second, Mask(first)) if leads_to_product(self.graph_module, second) else None
        inverted = is_call(node, aten.where.ScalarSelf)
        chosen, first, second = node.args
        number, below = (first, second) if inverted else (second, first)
        if (
            not isinstance(number, (int, float))
            or not isinstance(below, fx.Node)
            or not isinstance(chosen, fx.Node)
        ):
            return None
        if number > hidden_below(dtype_of(node)):
            return None
        return below, Mask(chosen, inverted, None if number == -math.inf else float(number))


def leads_to_product(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Is there a product of query and key below `node`, through what may stand between it and the softmax?"""
    while not is_call(node, aten.matmul.default):
        if is_call(node, aten.add.Tensor):
            return any(
                isinstance(part, fx.Node) and leads_to_product(graph_module, part) for part in node.args
            )
        if not is_call(node, *PASSED):
            return False
        below = (
            node.args[1]
            if is_call(node, aten.where.ScalarOther)
            else node.args[-1 if _is_scalar_self(node) else 0]
        )
        if not isinstance(below, fx.Node) or not is_tensor(below):
            return False
        node = below
    return rank_of(node) in (3, 4, 5)


PASSED: Final = (
    aten._to_copy.default,
    aten.reshape.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)


def _is_scalar_self(node: fx.Node) -> bool:
    return is_call(node, aten.where.ScalarSelf)
