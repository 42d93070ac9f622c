"""Let groups of query heads share one key and value head: multi-head to grouped-query or multi-query attention.

before:  k = heads(linear(x, wk [H * D, in])); v likewise;         attention(q, k, v) with H key heads
after:   k = heads(linear(x, mean of the rows of a group));        attention(q, k, v) with fewer key heads
why:     the cache and what is read of it per token shrink by the size of the groups
legal:   a lossy rewrite, asked for by name: exact where the heads of a group are equal, else a start for
         fine-tuning; the key heads divide evenly; keys and values (and queries) come from linears of their own
         through what treats all heads alike; weights are stored as they are read, and by nothing else
source:  Ainslie et al., GQA: training generalized multi-query transformer models from multi-head checkpoints (2023)

Heads that are alike come into one group: query heads then change places, in the rows of their projection and in the
columns of the linear behind the attention. Where that linear is not found, or a mask or sinks have numbers for each
head, neighbours form the groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from torchweld.graph.edit import insert_node, insert_weight
from torchweld.graph.match import constant_tensor, is_call, rank_of, shape_of
from torchweld.graph.ops import attention as attention_op
from torchweld.graph.rewrite import Exactness, Refusal, walk
from torchweld.passes.match_projections import Projection, match_output, match_projection

ATTENTION = torch.ops.torchweld.attention.default
OPERATOR_FILE = attention_op.__name__  # importing it is what registers ATTENTION
CONVERTED = "converted."
"""In front of the name of every weight that was made from the source's weight of that name."""


@dataclass(frozen=True)
class HeadsSite:
    """An attention with too many key heads, and the linears around it or why they are not what is expected."""

    anchor: fx.Node
    query: Projection | Refusal
    key: Projection | Refusal
    value: Projection | Refusal
    output: fx.Node | Refusal


@dataclass(frozen=True)
class ConvertAttentionHeads:
    """The pass for one number of key heads: `Options(lossy=(ConvertAttentionHeads(2),))`; ValueError below 1."""

    key_heads: int
    NAME: ClassVar[str] = "convert_attention_heads"
    EXACTNESS: ClassVar[Exactness] = "lossy"

    def __post_init__(self) -> None:
        if self.key_heads < 1:
            raise ValueError(f"ConvertAttentionHeads({self.key_heads}): at least 1 key head is expected")

    def find(self, graph_module: fx.GraphModule) -> Iterator[HeadsSite]:
        """Attentions with more key heads than wanted."""
        for node in walk(graph_module):
            heads = shape_of(node.args[1])[1] if is_call(node, ATTENTION) else 0  # type: ignore[arg-type]
            if not isinstance(heads, int) or heads <= self.key_heads:
                continue
            query, key, value = (match_projection(graph_module, operand) for operand in node.args[:3])
            yield HeadsSite(node, query, key, value, match_output(node))

    def check(self, graph_module: fx.GraphModule, site: HeadsSite) -> Refusal | None:
        """See `legal` above."""
        heads = shape_of(site.anchor.args[1])[1]  # type: ignore[arg-type]
        if heads % self.key_heads:
            return Refusal(f"{heads} key heads cannot be shared out over {self.key_heads}", site.anchor)
        return next((part for part in (site.key, site.value) if isinstance(part, Refusal)), None)

    def rewrite(self, graph_module: fx.GraphModule, site: HeadsSite) -> None:
        """New weights, and the way from keys and values to the attention once more with fewer heads."""
        node, key, value = site.anchor, site.key, site.value
        assert isinstance(key, Projection) and isinstance(value, Projection)
        heads = int(shape_of(key.split)[2])
        order = list(range(heads))
        query, output = site.query, site.output
        if isinstance(query, Projection) and isinstance(output, fx.Node) and not _has_numbers_per_head(node):
            order = group_alike(
                [_heads(graph_module, part.weight, heads) for part in (key, value)], self.key_heads
            )
            self._reorder(graph_module, query, output, order)
        for place, projection in ((1, key), (2, value)):
            linear = self._with_weights(
                graph_module, projection, lambda tensor: pool_heads(tensor, order, self.key_heads)
            )
            node.update_arg(place, self._again(node.args[place], projection, linear, node))
        node.meta["made_by"] = self.NAME
        node.meta["head_order"] = tuple(order)

    def _reorder(
        self, graph_module: fx.GraphModule, query: Projection, output: fx.Node, order: list[int]
    ) -> None:
        """Put the query heads of a group side by side."""
        if order == sorted(order):
            return
        linear = self._with_weights(graph_module, query, lambda tensor: order_heads(tensor, order))
        query.linear.replace_all_uses_with(linear)
        weight: Any = output.args[1]
        columns = order_heads(_tensor(graph_module, weight).T, order).T
        output.update_arg(1, self._stored(graph_module, output, weight, columns))

    def _with_weights(self, graph_module: fx.GraphModule, projection: Projection, change: Any) -> fx.Node:
        """The projection with its weight and bias changed."""
        old = projection.linear
        parts = [part for part in (projection.weight, projection.bias) if part is not None]
        new = [self._stored(graph_module, old, part, change(_tensor(graph_module, part))) for part in parts]
        args = (old.args[0], *new)
        return insert_node(old.graph, old, old.target, args, made_by=self.NAME, like=old)  # type: ignore[arg-type]

    def _stored(self, graph_module: fx.GraphModule, before: fx.Node, old: fx.Node, tensor: Tensor) -> fx.Node:
        name = CONVERTED + str(old.target).removeprefix(CONVERTED)
        return insert_weight(graph_module, before, name, tensor.contiguous(), made_by=self.NAME, like=old)

    def _again(self, operand: Any, projection: Projection, linear: fx.Node, before: fx.Node) -> fx.Node:
        """What led from the old linear to the attention, from the new one."""
        if operand is projection.linear:
            return linear
        rest = operand.args[1:]
        if operand is projection.split:
            batch, length, _, features = rest[0]
            rest = ([batch, length, self.key_heads, features],)
        args = (self._again(operand.args[0], projection, linear, before), *rest)
        return insert_node(
            before.graph, before, operand.target, args, operand.kwargs, made_by=self.NAME, like=operand
        )


def _has_numbers_per_head(attention: fx.Node) -> bool:
    """Must the query heads stay where they are, because sinks or a mask (ALiBi) are counted by them?"""
    mask: Any = attention.args[3]
    per_head = mask is not None and rank_of(mask) > 2 and shape_of(mask)[-3] != 1
    return per_head or len(attention.args) > 8


def group_alike(weights: list[Tensor], groups: int) -> list[int]:
    """An order of the heads in which each run of `len / groups` is a group, the most alike together.

    weights: [heads, ...] each. The first head that is left takes those nearest to it (cosine of all weights; the lower
    number where two are equally near), so equal heads meet wherever that is possible.
    """
    flat = torch.cat([weight.flatten(1).double() for weight in weights], 1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-30)
    likeness = (flat @ flat.T).tolist()
    left, order = list(range(len(flat))), []
    while left:
        first = left[0]
        near = sorted(left[1:], key=lambda head: (-round(likeness[first][head], 12), head))
        group = [first, *near[: len(flat) // groups - 1]]
        order += group
        left = [head for head in left if head not in group]
    return order


def pool_heads(tensor: Tensor, order: list[int], groups: int) -> Tensor:
    """[heads * features, ...] -> [groups * features, ...]: the mean over each group, in the tensor's dtype."""
    heads = _cut(_cut(tensor, len(order))[order], groups)
    same = heads[:, 0].flatten(0, 1)
    # Equal heads stay what they are, bit for bit.
    equal = (heads == heads[:, :1]).flatten(1).all(1).repeat_interleave(same.shape[0] // groups)
    mean = heads.double().mean(1).to(tensor.dtype).flatten(0, 1)
    return torch.where(equal.view(-1, *[1] * (tensor.dim() - 1)), same, mean)


def order_heads(tensor: Tensor, order: list[int]) -> Tensor:
    """[heads * features, ...] with the blocks of rows in the order of the key heads that they belong to."""
    return _cut(tensor, len(order))[order].flatten(0, 1)


def converted_state_dict(graph_module: fx.GraphModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` of the source model with the weights that the pass changed, under their old names.

    The model that reads it has the configuration of the source with the new number of key and value heads. Raises
    KeyError for a changed weight that the state dict does not name.
    """
    result = dict(state)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if not name.startswith(CONVERTED):
            continue
        source = name.removeprefix(CONVERTED)
        if source not in state:
            raise KeyError(f"convert_attention_heads changed {source}, which the state dict does not have")
        result[source] = _tensor(graph_module, node).detach().clone()
    return result


def _tensor(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    tensor = constant_tensor(graph_module, node)
    assert tensor is not None  # match_projections saw that it is stored
    return tensor.detach()


def _heads(graph_module: fx.GraphModule, weight: fx.Node, heads: int) -> Tensor:
    return _cut(_tensor(graph_module, weight), heads)


def _cut(tensor: Tensor, parts: int) -> Tensor:
    """[parts * n, ...] as [parts, n, ...]."""
    return tensor.reshape(parts, tensor.shape[0] // parts, *tensor.shape[1:])
