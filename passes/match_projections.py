"""The linears in front of and behind an attention: which weight makes which head.

linear(x, w [heads * features, in]) -> reshape [B, T, heads, features] -> permute -> what keeps heads apart
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    constant_number,
    is_call,
    is_tensor,
    only_user,
    rank_of,
    shape_of,
)
from torchweld.graph.rewrite import Refusal

HEADS_TO_FRONT: Final = [0, 2, 1, 3]


@dataclass(frozen=True)
class Projection:
    """One linear that makes the heads of query, key or value: [heads * features, in] and perhaps a bias."""

    linear: fx.Node
    split: fx.Node

    @property
    def weight(self) -> fx.Node:
        """The get_attr of the weight."""
        node = self.linear.args[1]
        assert isinstance(node, fx.Node)
        return node

    @property
    def bias(self) -> fx.Node | None:
        """The get_attr of the bias."""
        node = argument(self.linear, 2, "bias")
        return node if isinstance(node, fx.Node) else None


def match_projection(graph_module: fx.GraphModule, operand: object) -> Projection | Refusal:
    """The linear below an operand [B, H, T, D] of an attention, through what treats all heads alike."""
    node: Any = operand
    heads = -3  # the axis of the heads, counted from the end: in front of the positions, or behind them
    while isinstance(node, fx.Node) and node.op == "call_function":
        if len(node.users) != 1:
            return Refusal("the heads are used elsewhere", node)
        if is_call(node, aten.permute.default):
            axes: Any = node.args[1]
            if [axis % 4 for axis in axes] != HEADS_TO_FRONT:
                return Refusal("the heads are permuted in another way", node)
            heads = -5 - heads
        elif is_call(node, aten.reshape.default):
            return (
                _match_linear(graph_module, node)
                if heads == -2
                else Refusal("the heads are cut out of their place", node)
            )
        elif not _treats_heads_alike(graph_module, node, heads):
            return Refusal(f"{node.target} stands between the projection and the attention", node)
        node = node.args[0]
    return Refusal("the heads do not come from a linear", node if isinstance(node, fx.Node) else None)


def _match_linear(graph_module: fx.GraphModule, split: fx.Node) -> Projection | Refusal:
    linear: Any = split.args[0]
    while is_call(
        linear, aten.mul.Tensor, aten.div.Tensor, aten._to_copy.default
    ):  # OPT scales before it cuts
        if not _treats_heads_alike(graph_module, linear, -2) or len(linear.users) != 1:
            break
        linear = linear.args[0]
    if not is_call(linear, aten.linear.default) or rank_of(split) != 4:
        return Refusal("the heads do not come from a linear of their own", split)
    heads, features = shape_of(split)[-2:]
    if shape_of(split)[:2] != shape_of(linear)[:2] or shape_of(linear)[-1] != heads * features:
        return Refusal("the features of the projection are not cut into heads", split)
    return check_weights(linear) or Projection(linear, split)


def check_weights(linear: fx.Node) -> Refusal | None:
    """A stored weight (and bias) that nothing else reads, and a linear that nothing else reads."""
    for node in (linear.args[1], argument(linear, 2, "bias")):
        if node is None:
            continue
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return Refusal("the weight is not stored as the linear reads it", linear)
        if len(node.users) != 1:
            return Refusal("the weight is used elsewhere", node)
    return Refusal("the projection is used elsewhere", linear) if len(linear.users) != 1 else None


def _treats_heads_alike(graph_module: fx.GraphModule, node: fx.Node, heads: int) -> bool:
    """Rotary embeddings, norms over the features, casts and constant factors."""
    if is_call(node, torch.ops.torchweld.rope.default):
        return all(_is_one(other, heads) for other in node.args[1:] if is_tensor(other))
    if is_call(node, aten.rms_norm.default, aten.layer_norm.default):
        normalized: Any = node.args[1]
        return len(normalized) == 1
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return constant_number(graph_module, node.args[1]) is not None
    return is_call(node, aten._to_copy.default)


def _is_one(node: Any, axis: int) -> bool:
    """Does the tensor have one entry for all of `axis`?"""
    return rank_of(node) < -axis or shape_of(node)[axis] == 1


def match_output(attention: fx.Node) -> fx.Node | Refusal:
    """The linear that reads the mixed heads, [.., heads * features] -> [.., out]."""
    moved = only_user(attention)
    merged = None if moved is None or not is_call(moved, aten.permute.default) else only_user(moved)
    linear = None if merged is None or not is_call(merged, aten.reshape.default) else only_user(merged)
    if moved is None or merged is None or linear is None or not is_call(linear, aten.linear.default):
        return Refusal("the mixed heads are not read by a linear alone", attention)
    axes: Any = moved.args[1]
    heads, features = shape_of(attention)[1], shape_of(attention)[3]
    if [axis % 4 for axis in axes] != HEADS_TO_FRONT or shape_of(merged)[-1] != heads * features:
        return Refusal("the mixed heads are merged in another way", merged)
    if linear.args[0] is not merged:
        return Refusal("the mixed heads are not read by a linear alone", linear)
    weight: Any = linear.args[1]
    if weight.op != "get_attr" or len(weight.users) != 1:
        return Refusal("the weight behind the heads is shared or not stored as the linear reads it", linear)
    return linear
