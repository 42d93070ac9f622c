"""Compute at compile time what depends on no input.

before:  add(weight, 1.0); permute(weight, [1, 0]); arange(64); rsqrt(full([], 64.0))
after:   a get_attr of the result, stored as `folded.<weight>`; views share the memory of the weight
why:     (1 + w) of Gemma, transposed weights of GPT-2 and constant masks cost nothing at run time, and
         patterns can read their numbers
legal:   every input is a literal or a stored tensor; sizes are fixed; the op is deterministic and writes
         nothing; the result takes at most 64 MB or 4 times its inputs; stored weight bytes are not decoded
source:  constant folding, any compiler; the bound is the one of the reliability notes, section 3.3
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.edit import insert_weight, replace
from torchweld.graph.match import constant_tensor, is_tensor, tensor_of
from torchweld.graph.rewrite import Exactness, NodeSite, Refusal, walk

NAME: Final = "fold_constants"
EXACTNESS: Exactness = "exact"

MAX_BYTES: Final = 64 * 2**20
MAX_GROWTH: Final = 4


def find(graph_module: fx.GraphModule) -> Iterator[NodeSite]:
    """Calls of operators on nothing but literals and stored tensors."""
    for node in walk(graph_module):
        if (
            node.op == "call_function"
            and node.users
            and isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "aten"  # in particular, no dequantize: stored weights stay stored
            and is_tensor(node)
            and all(source.op == "get_attr" for source in node.all_input_nodes)
        ):
            yield NodeSite(node)


def check(graph_module: fx.GraphModule, site: NodeSite) -> Refusal | None:
    """See `legal` above."""
    node = site.anchor
    operator = node.target
    assert isinstance(operator, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return Refusal(f"{operator} is random", node)
    if operator._schema.is_mutable:
        return Refusal(f"{operator} writes", node)
    if any(not isinstance(size, int) for size in tensor_of(node).shape):
        return Refusal("the result has a size that is not fixed", node)
    taken = sum(_bytes(source) for source in node.all_input_nodes)
    if not _is_view(operator) and _bytes(node) > max(MAX_BYTES, MAX_GROWTH * taken):
        return Refusal(f"the result takes {_bytes(node)} bytes, its inputs {taken}", node)
    return None


def rewrite(graph_module: fx.GraphModule, site: NodeSite) -> None:
    """Run the call on the stored tensors and store its result."""
    node = site.anchor
    operator = node.target
    assert isinstance(operator, torch._ops.OpOverload)

    def stored(source: fx.Node) -> torch.Tensor | None:
        return constant_tensor(graph_module, source)

    args: Any = fx.node.map_arg(node.args, stored)
    kwargs: Any = fx.node.map_arg(dict(node.kwargs), stored)
    with torch.no_grad():
        result = operator(*args, **kwargs)
    weight = insert_weight(graph_module, node, _name(graph_module, node), result, made_by=NAME, like=node)
    replace(node, weight)


def _name(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """A free name below `folded`: that of the first stored tensor in it, which says whose weight this is (and of
    which layer), else that of the node."""
    sources = [str(source.target).removeprefix("folded.") for source in node.all_input_nodes]
    wanted = f"folded.{sources[0] if sources else node.name}"
    name, count = wanted, 0
    while _is_taken(graph_module, name):
        count += 1
        name = f"{wanted}_{count}"
    return name


def _is_taken(graph_module: fx.GraphModule, name: str) -> bool:
    owner: object = graph_module
    for word in name.split("."):
        if not hasattr(owner, word):
            return False
        owner = getattr(owner, word)
    return True


def _bytes(node: fx.Node) -> int:
    value = tensor_of(node)
    return value.numel() * value.element_size()


def _is_view(operator: torch._ops.OpOverload) -> bool:
    """Does the result share the memory of an argument? (reshape decides at run time, so it counts as a
    copy.)"""
    return any(result.alias_info is not None for result in operator._schema.returns)
