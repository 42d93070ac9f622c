"""Names that say what a kernel does: `rms_norm_q_proj_k_proj_v_proj`, from the operations and the weights they read."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection

from torch import fx

from torchweld.graph.groups import Group, kind_of

MAX_NAME = 60
GENERIC = frozenset({"weight", "bias", "data", "table"})


def identifier(text: str) -> str:
    """`text` as a name for C++ and Python."""
    cleaned = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_").lower() or "value"
    return f"v_{cleaned}" if cleaned[0].isdigit() else cleaned


def unique(name: str, taken: Collection[str]) -> str:
    """`name`, with a number behind it if it is taken (also as the name of an output)."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def owner_name(node: fx.Node) -> str:
    """The layer that a weight belongs to, without numbers: `layers.3.attn.q_proj.weight` is `q_proj`."""
    words = [word for word in str(node.target).split(".") if not word.isdigit()]
    while len(words) > 1 and words[-1] in GENERIC:
        words.pop()
    return identifier(words[-1])


def buffer_hint(node: fx.Node) -> str:
    """A buffer's name: that of a weight and its owner, of an input, or of the operation that made it."""
    if node.op == "get_attr":
        words = [word for word in str(node.target).split(".") if not word.isdigit()]
        return identifier("_".join(words[-2:]))
    if node.op == "placeholder":
        return identifier(str(node.target))
    return operation_name(node)


def operation_name(node: fx.Node) -> str:
    """`aten.silu.default` is `silu`; one of several results has the name of what gives them."""
    source = node.args[0] if node.target is operator.getitem else node
    if isinstance(source, fx.Node) and source is not node:
        return operation_name(source)
    words = str(node.target).split(".")
    return identifier(words[1] if len(words) > 1 else words[0])


def kernel_name(group: Group) -> str:
    """Norms, matmuls (by their weight's owner), attention and reductions in order; pointwise work only if alone."""
    words: list[str] = []
    pointwise: list[str] = []
    inside = set(group.inside)
    for node in group.nodes:
        kind, name = kind_of(node), operation_name(node)
        if kind == "contract":
            owners = [owner_name(n) for n in _weights_of(node, inside)]
            words.append(owners[0] if owners else name)
        elif kind in ("reduce", "attention") or name in ("rope", "embedding", "cat", "silu", "gelu"):
            words.append(name)
        else:
            pointwise.append(name)
    chosen = list(dict.fromkeys(words)) or list(dict.fromkeys(pointwise))[:5]
    if words and pointwise:
        chosen += [name for name in dict.fromkeys(pointwise) if name == "add"]
    name = "_".join(chosen)
    while len(name) > MAX_NAME and len(chosen) > 1:
        chosen = chosen[:-1]
        name = "_".join(chosen) + "_and_more"
    return identifier(name)[: MAX_NAME + 9]


def _weights_of(node: fx.Node, inside: Collection[fx.Node]) -> list[fx.Node]:
    """Weights that a matmul's second operand reads, through views and decoding."""
    stack, found = [node.all_input_nodes[1]] if len(node.all_input_nodes) > 1 else [], []
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            found.append(current)
        elif current in inside:
            stack.extend(current.all_input_nodes)
    return found
