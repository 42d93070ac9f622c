"""Remove operations that give back their input, and give casts one spelling.

before:  clone, contiguous, detach, alias, dropout in evaluation; x[:], reshape and expand to the same shape,
         permute to the same order; to(dtype), type_as; x * 1, x / 1, n + 0 for integers
after:   x; a real cast is aten._to_copy(x, dtype=...)
why:     they hide patterns, and each would be a copy of the whole tensor
legal:   value, dtype and shape stay for every symbolic size; the result is not an output that would become
         an alias of an input or weight; dropout is not training; a cast changes nothing but the dtype
source:  identity elimination, any compiler
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    MAX_INDEX,
    argument,
    aten,
    axis_argument,
    constant_number,
    dtype_of,
    is_call,
    is_tensor,
    rank_of,
    same_shape,
    shape_of,
    tensor_of,
)
from torchweld.graph.rewrite import (
    Exactness,
    Refusal,
    Rule,
    RuleSite,
    Spelling,
    Target,
    apply_rule,
    check_rule,
    find_by_rules,
)

NAME: Final = "canonicalize_identities"
EXACTNESS: Exactness = "exact"

ALIASING: Final = frozenset(
    {aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.select.int, aten.expand.default}
)


def _copy(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | Refusal:
    """A copy may go unless it is what keeps an output apart from an input."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if any(user.op == "output" for user in node.users):
        root = source
        while is_call(root, *ALIASING):
            assert isinstance(root.args[0], fx.Node)
            root = root.args[0]
        if root.op in ("placeholder", "get_attr"):
            return Refusal("the output would become an alias of an input or weight", node)
        # Two outputs must stay two tensors.
        if any(user.op == "output" for user in source.users):
            return Refusal("two outputs would become one tensor", node)
    return source


def _alias(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _dropout(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | Refusal:
    if argument(node, 2, "train", True) and argument(node, 1, "p", 0.5) != 0:
        return Refusal("dropout is training", node)
    return _copy(graph_module, node)


def _getitem(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | Refusal | None:
    """native_dropout(x, p, False)[0]."""
    call = node.args[0]
    if not is_call(call, aten.native_dropout.default) or node.args[1] != 0:
        return None
    assert isinstance(call, fx.Node)
    if argument(call, 2, "train", True):
        return Refusal("dropout is training", call)
    source: Any = call.args[0]
    return source if isinstance(source, fx.Node) else None


def _cast(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | fx.Node | Refusal | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if tensor_of(source).device != tensor_of(node).device or _changes_layout(node):
        return Refusal("the cast also changes device or memory format", node)
    if dtype_of(source) == dtype_of(node):
        return _copy(graph_module, node)
    if node.target is aten._to_copy.default and dict(node.kwargs) == {"dtype": dtype_of(node)}:
        return None
    return Spelling(aten._to_copy.default, (source,), {"dtype": dtype_of(node)})


def _changes_layout(node: fx.Node) -> bool:
    layout, form = node.kwargs.get("layout"), node.kwargs.get("memory_format")
    return layout not in (None, torch.strided) or form not in (
        None,
        torch.preserve_format,
        torch.contiguous_format,
    )


def _same_shape(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and same_shape(source, node) else None


def _permute(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    axes: Any = node.args[1]
    source = node.args[0]
    keeps = [axis % len(axes) for axis in axes] == list(range(len(axes)))
    return source if keeps and isinstance(source, fx.Node) else None


def _slice(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axis = axis_argument(node, 1, "dim", rank_of(source))
    start, end, step = (
        argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step"))
    )
    size = shape_of(source)[axis]
    # Equal shapes alone prove it too: a slice of as many elements as there are is all of them.
    whole = end in (None, MAX_INDEX) or (isinstance(end, int) and isinstance(size, int) and end >= size)
    if step in (None, 1) and ((start in (None, 0) and whole) or same_shape(source, node)):
        return source
    return None


def _repeat(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    """repeat that repeats nothing, though it may add axes in front."""
    source: Any = node.args[0]
    counts: Any = node.args[1]
    if any(not isinstance(count, int) or count != 1 for count in counts):
        return None
    added = len(counts) - rank_of(source)
    shape = shape_of(source)
    if not all(isinstance(size, int) for size in shape):
        return None
    return Spelling(aten.reshape.default, (source, [1] * added + list(shape)))


def _cat(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | fx.Node | None:
    """cat without its empty pieces; cat of one piece is that piece."""
    pieces: Any = node.args[0]
    full = [piece for piece in pieces if 0 not in shape_of(piece)]
    if len(full) == 1 and same_shape(full[0], node) and dtype_of(full[0]) == dtype_of(node):
        kept: fx.Node = full[0]
        return kept
    same_type = all(dtype_of(piece) == dtype_of(node) for piece in full)
    if len(full) == len(pieces) or not full or not same_type:
        return None
    return Spelling(aten.cat.default, (full, *node.args[1:]), node.kwargs)


def _neutral(neutral: int, integers_only: bool, commutative: bool) -> Rule:
    """Rule for x op neutral. Zero is no neutral element of float addition: -0.0 + 0 is +0.0."""

    def rule(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        orders = [tuple(node.args)] + ([tuple(reversed(node.args))] if commutative else [])
        for operand, number in orders:
            value = constant_number(graph_module, number)
            if value is None or value != neutral or not is_tensor(operand):
                continue
            assert isinstance(operand, fx.Node)
            if integers_only and dtype_of(operand).is_floating_point:
                continue
            if dtype_of(operand) == dtype_of(node) and same_shape(operand, node):
                return operand
        return None

    return rule


RULES: Final[dict[Target, Rule]] = {
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default), _copy),
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.lift_fresh.default), _alias),
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    operator.getitem: _getitem,
    **dict.fromkeys(
        (
            aten._to_copy.default,
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten.type_as.default,
        ),
        _cast,
    ),
    aten.reshape.default: _same_shape,
    aten.expand.default: _same_shape,
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.repeat.default: _repeat,
    aten.cat.default: _cat,
    aten.mul.Tensor: _neutral(1, integers_only=False, commutative=True),
    aten.div.Tensor: _neutral(1, integers_only=False, commutative=False),
    aten.add.Tensor: _neutral(0, integers_only=True, commutative=True),
    aten.sub.Tensor: _neutral(0, integers_only=True, commutative=False),
    aten.pow.Tensor_Scalar: _neutral(1, integers_only=False, commutative=False),
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Calls that may give back their input, and casts."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Let the users read the input, or respell the cast."""
    apply_rule(graph_module, site, NAME)
