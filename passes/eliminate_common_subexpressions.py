"""Compute the same thing once.

before:  a = f(x, 1); b = f(x, 1)
after:   a = f(x, 1), read in both places
why:     Hugging Face models build masks and positions once per layer type; sharing makes the proof of one
         serve all
legal:   the same operator on the same nodes and literals (of the same type: 1 is not 1.0); deterministic,
         writes nothing; not both results are outputs, which must stay two tensors
source:  value numbering, Alpern, Wegman and Zadeck (1988)
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from torchweld.graph.edit import replace
from torchweld.graph.rewrite import Exactness, Refusal, walk

NAME: Final = "eliminate_common_subexpressions"
EXACTNESS: Exactness = "exact"

SIZE_ARITHMETIC: Final = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.getitem,
    }
)


@dataclass(frozen=True)
class Duplicate:
    """`anchor` computes what the earlier node `original` has computed."""

    anchor: fx.Node
    original: fx.Node


def find(graph_module: fx.GraphModule) -> Iterator[Duplicate]:
    """Nodes with the key of an earlier node; merging in graph order lets whole chains collapse in one
    sweep."""
    seen: dict[Hashable, fx.Node] = {}
    for node in walk(graph_module):
        key = value_key(node)
        if key is None:
            continue
        original = seen.setdefault(key, node)
        if original is not node:
            yield Duplicate(node, original)


def check(graph_module: fx.GraphModule, site: Duplicate) -> Refusal | None:
    """See `legal` above."""
    target = site.anchor.target
    if isinstance(target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in target.tags:
            return Refusal(f"{target} is random", site.anchor)
        if target._schema.is_mutable:
            return Refusal(f"{target} writes", site.anchor)
    if _is_output(site.anchor) and _is_output(site.original):
        return Refusal("both results are outputs", site.anchor)
    return None


def rewrite(graph_module: fx.GraphModule, site: Duplicate) -> None:
    """Let the users of the duplicate read the original."""
    replace(site.anchor, site.original)


def value_key(node: fx.Node) -> Hashable | None:
    """Equal keys mean equal values; None for nodes that are never merged."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function":
        return None
    if not isinstance(node.target, torch._ops.OpOverload) and node.target not in SIZE_ARITHMETIC:
        return None
    try:
        key = (node.target, _freeze(node.args), _freeze(dict(node.kwargs)))
        hash(key)
    except TypeError:
        return None
    return key


def _freeze(value: object) -> Hashable:
    """A hashable twin of an argument that keeps the types apart: 1, 1.0 and True are equal to Python."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _freeze(value[name])) for name in sorted(value))
    if isinstance(value, slice):
        return ("slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step))
    if isinstance(value, float):
        return (float, value.hex())  # -0.0 is not 0.0
    hash(value)
    return (type(value), value)


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)
