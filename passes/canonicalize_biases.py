"""A bias that is a line over the keys and counted from the last one is counted from the first.

before:  attention(q, k, v, table[.., L - S :], "causal")     S keys of at most L;  table[h, j] = a[h] + b[h] * j
after:   attention(q, k, v, line[.., : S], "causal")          line[h, j] = b[h] * j
why:     the two differ by the same number for all keys of a query, which a softmax does not see; entry j of the second
         depends on position j alone, so that a KV cache can be derived (MPT's ALiBi; BLOOM counts from the first)
legal:   the bias is a stored table that is cut at the front to the number of keys; it is the same for every query and
         sequence; it is a line up to rounding; there are no sinks, which have no bias and would notice
source:  Press et al., Train Short, Test Long (2022), section 3: adding a constant changes nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import sympy
import torch
from torch import Tensor, fx

from torchweld.graph.edit import insert_node, insert_weight
from torchweld.graph.match import (
    MAX_INDEX,
    argument,
    aten,
    axis_argument,
    constant_tensor,
    dim_key,
    is_call,
    shape_of,
    tensor_of,
)
from torchweld.graph.ops import attention as attention_op
from torchweld.graph.rewrite import Exactness, Refusal, walk
from torchweld.passes.canonicalize_views import read_size

NAME: Final = "canonicalize_biases"
EXACTNESS: Exactness = "reassoc"

ATTENTION: Final = torch.ops.torchweld.attention.default
OPERATOR_FILE: Final = attention_op.__name__  # importing it is what registers ATTENTION
ROUNDING: Final = 1e-6
"""Of the greatest magnitude in a table: so far its entries may be from a line."""


@dataclass(frozen=True)
class BiasSite:
    """An attention, and the node of the stored table [.., heads or 1, .., L] of which its mask is the last part."""

    anchor: fx.Node
    source: fx.Node
    table: Tensor
    """The same as [heads or 1, L]."""


def find(graph_module: fx.GraphModule) -> Iterator[BiasSite]:
    """Attentions whose mask is a stored table from L - S on, S the number of keys."""
    for node in walk(graph_module):
        if is_call(node, ATTENTION) and isinstance(node.args[3], fx.Node):
            site = _cut_table(graph_module, node, node.args[3])
            if site is not None:
                yield site


def _cut_table(graph_module: fx.GraphModule, attention: fx.Node, mask: fx.Node) -> BiasSite | None:
    """The table whose last S entries per head `mask` is."""
    key: Any = attention.args[1]
    keys, start, node = shape_of(key)[2], None, mask
    while True:
        source: Any = node.args[0] if node.args else None
        if is_call(node, aten.slice.Tensor) and argument(node, 4, "step", 1) == 1:
            sizes = shape_of(source)
            axis = axis_argument(node, 1, "dim", len(sizes))
            if axis == len(sizes) - 1 and start is None:
                start = node.args[2]
            elif sizes[axis] != 1:
                return None
            if argument(node, 3, "end") not in (None, MAX_INDEX):
                return None
        elif not is_call(node, aten.reshape.default):
            break
        node = source
    table = constant_tensor(graph_module, node)
    if table is None or start is None or not table.is_floating_point() or table.dim() == 0:
        return None
    length = table.shape[-1]
    is_per_head = sum(size != 1 for size in table.shape[:-1]) <= 1
    if length < 2 or not is_per_head or not _counts_from_the_end(start, length, sympy.sympify(keys)):
        return None
    return BiasSite(attention, node, table.detach().reshape(-1, length))


def _counts_from_the_end(start: Any, length: int, keys: Any) -> bool:
    """Is this L - S, also as max(0, L - S) or -S? (More keys than L have no such mask in the source either.)"""
    begin = sympy.sympify(dim_key(start.meta["val"] if isinstance(start, fx.Node) else start))
    if begin.func.__name__ == "Max":  # torch has a Max of its own
        return set(begin.args) == {sympy.Integer(0), length - keys}
    return begin in (length - keys, -keys)


def check(graph_module: fx.GraphModule, site: BiasSite) -> Refusal | None:
    """See `legal` above."""
    node, table = site.anchor, site.table
    shape = shape_of(node.args[3])  # type: ignore[arg-type]
    if len(node.args) > 8 and node.args[8] is not None:
        return Refusal("there are sinks, which have no bias", node)
    if table.shape[0] != 1 and shape[-3:-2] != (table.shape[0],):
        return Refusal("the bias differs between queries or sequences", node)
    off = (table.double() - table[:, :1].double() - _line(table)).abs().max()
    if not float(off) <= ROUNDING * float(table.abs().max()):
        return Refusal("the bias is no line over the keys", node)
    if read_size(graph_module, node, shape_of(node.args[1])[2]) is None:  # type: ignore[arg-type]
        return Refusal("the number of keys cannot be read from any node", node)
    return None


def _line(table: Tensor) -> Tensor:
    """b * j in float64, with the slope b over the whole table."""
    length = table.shape[1]
    slope = (table[:, -1:].double() - table[:, :1].double()) / (length - 1)
    return slope * torch.arange(length, device=table.device)


def rewrite(graph_module: fx.GraphModule, site: BiasSite) -> None:
    """Read the first entries of the line in place of the last ones of the table."""
    node = site.anchor
    mask: Any = node.args[3]
    name = f"folded.{str(site.source.target).removeprefix('folded.')}_line"
    made = [known for known in graph_module.graph.find_nodes(op="get_attr") if known.target == name]
    if made:
        line = made[0]
    else:
        tensor = _line(site.table).to(tensor_of(mask).dtype)[None, :, None]
        line = insert_weight(graph_module, site.source, name, tensor, made_by=NAME, like=mask)
    keys = read_size(graph_module, node, shape_of(node.args[1])[2])  # type: ignore[arg-type]
    cut = insert_node(
        graph_module.graph, node, aten.slice.Tensor, (line, 3, 0, keys), made_by=NAME, like=mask
    )
    node.update_arg(3, cut)
    node.meta["made_by"] = NAME
