"""Give every attention one spelling, with a mask kind that is proved.

before:  softmax(scale * q @ k^T [soft cap] + masks) @ v in any order that HF models write;
         scaled_dot_product_attention; keys and values repeated per group of query heads
after:   torchweld::attention(q, k, v, mask, mask_kind, window, scale, soft_cap, sinks) on unrepeated keys and
         values
why:     the scores never reach memory, masks by position are computed in registers, and a KV cache can be
         derived
legal:   the weights are used once and not trained with dropout; the softmax is over the keys; nothing
         stands between the parts but scale, soft cap, masks, sinks, casts and merged heads; a mask kind needs a
         proof over all sizes (see prove_mask), every other mask stays a tensor
source:  Dao et al., FlashAttention (2022); Ainslie et al., GQA (2023)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.edit import replace
from torchweld.graph.match import aten, dtype_of, is_call, rank_of, shape_of, tensor_of
from torchweld.graph.ops import attention as attention_op
from torchweld.graph.position_rules import make_prover
from torchweld.graph.positions import Extents
from torchweld.graph.rewrite import Exactness, Refusal, Spelling, build, walk
from torchweld.passes.canonicalize_views import read_size, read_sizes
from torchweld.passes.match_attention import Attention, match_naive, match_sdpa, weights_of
from torchweld.passes.match_heads import Operand
from torchweld.passes.prove_mask import Verdict, prove_mask

NAME: Final = "recognize_attention"
EXACTNESS: Exactness = "reassoc"

ATTENTION: Final = torch.ops.torchweld.attention.default
OPERATOR_FILE: Final = attention_op.__name__  # importing it is what registers ATTENTION


TOP_LEFT: Final = (
    "is_causal stays a tensor: torch aligns it at the first key, and there may be more keys than queries"
)


@dataclass(frozen=True)
class AttentionSite:
    """`anchor` holds the mixed values; `found` is what stands before it, or why it is no attention of
    ours."""

    anchor: fx.Node
    found: Attention | Refusal


def find(graph_module: fx.GraphModule) -> Iterator[AttentionSite]:
    """scaled_dot_product_attention, and products with the result of a softmax."""
    for node in walk(graph_module):
        if is_call(node, aten.scaled_dot_product_attention.default):
            yield AttentionSite(node, match_sdpa(graph_module, node))
        elif is_call(node, aten.matmul.default) and weights_of(node) is not None:
            yield AttentionSite(node, match_naive(graph_module, node))


def check(graph_module: fx.GraphModule, site: AttentionSite) -> Refusal | None:
    """See `legal` above; the clauses of the parts are checked where they are matched."""
    found = site.found
    if isinstance(found, Refusal):
        return found
    if dtype_of(found.value.node) != dtype_of(site.anchor):
        return Refusal("the result has another dtype than the values", site.anchor)
    if not _sizes_are_known(graph_module, site.anchor, found):
        return Refusal("a symbolic size of the heads cannot be read from any node", site.anchor)
    return None


def _sizes_are_known(graph_module: fx.GraphModule, anchor: fx.Node, found: Attention) -> bool:
    """Can every size that the rewrite may write into a reshape be read?"""
    shapes = [(*found.shape, *found.key.shape), shape_of(anchor)]
    shapes += [part.view for part in (found.query, found.key, found.value) if part.view is not None]
    known = all(read_sizes(graph_module, anchor, shape) is not None for shape in shapes)
    return known and (
        not found.top_left or None not in [read_size(graph_module, anchor, size) for size in found.shape[2:]]
    )


def rewrite(graph_module: fx.GraphModule, site: AttentionSite) -> None:
    """Build the attention on [batch, heads, positions, features], and restore the anchor's shape if it had
    merged batch and heads."""
    found = site.found
    assert isinstance(found, Attention)
    prover = make_prover(graph_module, Extents(*found.shape))
    verdict = prove_mask(prover, found.masks, causal=found.causal)
    query, key, value = (
        build(graph_module.graph, _as_heads(graph_module, site.anchor, node, found), site.anchor, NAME)
        for node in (found.query, found.key, found.value)
    )
    mask = _mask_tensor(graph_module, site.anchor, found, verdict)
    sinks = () if found.sinks is None else (_flat_sinks(found.sinks.node),)
    options = (verdict.kind, verdict.window, found.scale, found.soft_cap, *sinks)
    call = Spelling(ATTENTION, (query, key, value, mask, *options))
    node = build(graph_module.graph, call, site.anchor, NAME)
    node.meta["mask_name"] = "tensor" if found.top_left else verdict.name
    node.meta["mask_proof"] = TOP_LEFT if found.top_left else verdict.proof
    if rank_of(site.anchor) != 4:
        sizes = read_sizes(graph_module, site.anchor, list(shape_of(site.anchor)))
        node = build(graph_module.graph, Spelling(aten.reshape.default, (node, sizes)), site.anchor, NAME)
    replace(site.anchor, node)


def _flat_sinks(node: fx.Node) -> fx.Node | Spelling:
    """The sinks as one axis."""
    return node if rank_of(node) == 1 else Spelling(aten.reshape.default, (node, [-1]))


def _as_heads(graph_module: fx.GraphModule, anchor: fx.Node, operand: Operand, found: Attention) -> Any:
    """`operand` with batch and heads as two axes: what it was reshaped from, or a reshape."""
    node = operand.node
    if len(operand.shape) == 3:
        shape = (*found.shape[:2], *operand.shape[1:])
        if operand.order is None and is_call(node, aten.reshape.default):
            source = node.args[0]
            if isinstance(source, fx.Node) and shape_of(source) == shape:
                return source
        return Spelling(
            aten.reshape.default, (_moved(operand, node), read_sizes(graph_module, anchor, shape))
        )
    if operand.view is None:
        return _moved(operand, node)
    viewed = Spelling(aten.reshape.default, (node, read_sizes(graph_module, anchor, operand.view)))
    return _moved(operand, viewed)


def _moved(operand: Operand, value: Any) -> Any:
    """`value` with the axes in the operand's order."""
    return value if operand.order is None else Spelling(aten.permute.default, (value, list(operand.order)))


def _mask_tensor(
    graph_module: fx.GraphModule, anchor: fx.Node, found: Attention, verdict: Verdict
) -> fx.Node | Spelling | None:
    """All masks that stay tensors as one: booleans joined by and, numbers by +, both by where."""
    visible: Any = _triangle(graph_module, anchor, found) if found.top_left else None
    bias: Any = None
    for mask in verdict.kept:
        tensor: Any = mask.node
        if rank_of(mask.node) == 3:
            tensor = _split_mask(graph_module, anchor, mask.node, found)
        if (
            mask.hidden is not None
        ):  # scores replaced by a finite number: that is an added one, see prove_mask
            tensor = Spelling(
                aten.where.Scalar, (tensor, *((mask.hidden, 0.0) if mask.inverted else (0.0, mask.hidden)))
            )
        elif mask.inverted:
            tensor = Spelling(aten.logical_not.default, (tensor,))
        if mask.is_boolean and mask.hidden is None:
            visible = tensor if visible is None else Spelling(aten.logical_and.default, (visible, tensor))
        else:
            bias = tensor if bias is None else Spelling(aten.add.Tensor, (bias, tensor))
    if visible is None or bias is None:
        only: fx.Node | Spelling | None = visible if bias is None else bias
        return only
    return Spelling(aten.where.ScalarOther, (visible, bias, float("-inf")))


def _triangle(graph_module: fx.GraphModule, anchor: fx.Node, found: Attention) -> Spelling:
    """Key s is visible to query t if s <= t, as a boolean tensor [t, s]."""
    device = {"device": tensor_of(anchor).device}
    queries, keys = (
        Spelling(aten.arange.default, (read_size(graph_module, anchor, size),), device)
        for size in found.shape[2:]
    )
    return Spelling(aten.le.Tensor, (keys, Spelling(aten.reshape.default, (queries, [-1, 1]))))


def _split_mask(graph_module: fx.GraphModule, anchor: fx.Node, mask: fx.Node, found: Attention) -> Spelling:
    """[batch * heads, t, s] or [heads, t, s] as [batch, heads, t, s]; a leading 1 stays broadcast."""
    merged, queries, keys = shape_of(mask)
    leading = [1, merged] if merged in (1, found.shape[1]) else list(found.shape[:2])
    return Spelling(aten.reshape.default, (mask, read_sizes(graph_module, anchor, [*leading, queries, keys])))
