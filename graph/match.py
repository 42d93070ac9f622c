"""Questions that passes ask about nodes: what is called, on what shape, with which constant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torchweld.graph.program import get_tensor

aten = torch.ops.aten
MAX_INDEX = 2**63 - 1
"""How ATen spells "to the end" in a slice."""

Dim = Any
"""A size made comparable: an int, or the sympy expression of a symbolic size."""


def is_call(node: object, *targets: object) -> bool:
    """Is this a node that calls one of `targets`?"""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The FakeTensor that describes the node's value; TypeError for sizes and tuples."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{node.name} is a {type(value).__name__}, not a tensor")
    return value


def is_tensor(node: object) -> bool:
    """Is this a node with one tensor as its value?"""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Element type of the node's value."""
    return tensor_of(node).dtype


def rank_of(node: fx.Node) -> int:
    """Number of axes of the node's value."""
    return tensor_of(node).dim()


def dim_key(size: int | torch.SymInt) -> Dim:
    """`size` as an int or a sympy expression: comparable with == without leaving a guard in the shape
    environment."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def shape_of(node: fx.Node) -> tuple[Dim, ...]:
    """Sizes of the node's value as comparable keys."""
    return tuple(dim_key(size) for size in tensor_of(node).shape)


def same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Are the two shapes equal for every value of the symbolic sizes?"""
    return shape_of(first) == shape_of(second)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Argument of a call by position or by name, else `default`."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def axis_argument(node: fx.Node, position: int, name: str, rank: int, default: int = 0) -> int:
    """A dimension argument counted from the front."""
    axis: int = argument(node, position, name, default)
    return axis % rank if rank else 0


def constant_tensor(graph_module: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The weight or constant behind a get_attr node; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or not is_tensor(node):
        return None
    return get_tensor(graph_module, str(node.target))


def constant_number(graph_module: fx.GraphModule, value: object) -> float | int | None:
    """The number that `value` always is: a literal, or a get_attr of one element; None if it is not one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    tensor = constant_tensor(graph_module, value)
    if tensor is None or tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    return tensor.item()


def operand_and_number(
    graph_module: fx.GraphModule, node: fx.Node, *, commutative: bool = True
) -> tuple[fx.Node, float] | None:
    """(x, c) for a call f(x, c) with c a constant number that neither widens nor broadcasts x; also f(c, x)
    when `commutative`."""
    if len(node.args) != 2 or node.kwargs:
        return None
    orders = [(node.args[0], node.args[1])]
    if commutative:
        orders.append((node.args[1], node.args[0]))
    for operand, number in orders:
        found = constant_number(graph_module, number)
        if found is None or not is_tensor(operand) or constant_number(graph_module, operand) is not None:
            continue
        assert isinstance(operand, fx.Node)
        if shape_of(operand) == shape_of(node) and dtype_of(operand) == dtype_of(node):
            return operand, float(found)
    return None


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a binary call on two tensors (no alpha)."""
    if len(node.args) != 2 or node.kwargs or not (is_tensor(node.args[0]) and is_tensor(node.args[1])):
        return None
    assert isinstance(node.args[0], fx.Node) and isinstance(node.args[1], fx.Node)
    return node.args[0], node.args[1]


def other_operand(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The operand of a commutative binary call that is not `one`; `one` itself for f(one, one)."""
    pair = operands(node)
    if pair is None or one not in pair:
        return None
    return pair[1] if pair[0] is one else pair[0]


def close(value: float, expected: float, tolerance: float = 1e-6) -> bool:
    """Is a constant of the user's source the constant of the formula? Sources round to about seven digits."""
    return math.isclose(value, expected, rel_tol=tolerance)


def is_last_axis(node: fx.Node, dims: object) -> bool:
    """Does the argument `dims` (an int or a list) name exactly the last axis of `node`?"""
    axes = [dims] if isinstance(dims, int) else dims
    if not isinstance(axes, Sequence) or len(axes) != 1:
        return False
    axis = axes[0]
    return axis in (-1, rank_of(node) - 1)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's single user, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
