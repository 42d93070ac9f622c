"""What attention does to the sequence axis: it may look back, so its keys and values become a state.

A rule of `sequence_rules`; attention over an encoder's result is that of `sequence_encoder`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from torchweld.graph.match import rank_of
from torchweld.graph.ops import attention as attention_op
from torchweld.graph.sequence import Along, Mixes, Scope
from torchweld.graph.sequence_encoder import cross_attention, is_cross
from torchweld.graph.sequence_pairs import place_pairs

OPERATOR_FILE: Final = attention_op.__name__  # importing it is what registers the op
ATTENTION: Final = torch.ops.torchweld.attention.default


def attention_rule(scope: Scope, node: fx.Node) -> Along:
    """It may look back: its keys and values become a state, unless they are an encoder's."""
    if is_cross(scope, node):
        return cross_attention(scope, node)
    query, key, value, mask, kind = node.args[:5]
    for name, operand in (("query", query), ("key", key), ("value", value)):
        along = scope.of(operand)
        whole = along is not None and along.axis == 2 and scope.is_whole(operand, 2)  # type: ignore[arg-type]
        if not whole:
            raise Mixes(f"the {name} of this attention is not one row per token (cross attention?)")
    if kind == "none" and mask in scope.set_aside:
        raise scope.set_aside[mask]  # type: ignore[index]
    if kind == "none":
        raise Mixes("attention without a causal mask: every token sees later tokens")
    if isinstance(mask, fx.Node):
        _check_mask(scope, node, mask)
    for sinks in node.args[8:]:
        if sinks in scope.set_aside:
            raise scope.set_aside[sinks]  # type: ignore[index]
        if sinks in scope.encoder:
            raise Mixes(f"the sinks {sinks} of this attention depend on other inputs than the tokens")
    scope.attentions.append(node)
    return Along(2, tokens=True)


def _check_mask(scope: Scope, node: fx.Node, mask: fx.Node) -> None:
    """On top of the positions a mask may depend on heads, and on the positions of the query and the key alone."""
    if mask in scope.set_aside:
        try:
            scope.pair_masks[node] = place_pairs(scope, mask)
        except Mixes:
            raise scope.set_aside[mask] from None
        return
    if mask in scope.encoder:
        raise Mixes(f"the mask {mask.name} of this attention depends on other inputs than the tokens")
    along = scope.of(mask)
    if along is None:
        return
    if along.tokens:
        raise Mixes(
            f"the mask {mask.name} of this attention depends on the tokens; only masks by position have a rule"
        )
    if along.axis != rank_of(mask) - 1 or not scope.is_whole(mask, along.axis):
        raise Mixes(
            f"the mask {mask.name} of this attention is a tensor that no proof reduces to causal or window"
        )
    scope.key_masks[node] = mask
