"""Every product with a constant matrix is aten.linear on the unflattened input, with its bias inside.

before:  matmul(x, t(w)); mm; addmm(b, x, w) (GPT-2's Conv1D); linear(x, w) + b;
         reshape(linear(reshape(x, [-1, k]), w), [..., n])
after:   linear(x, w, b); a weight stored [in, out] is read through permute(w), which constant folding turns
         into a view of the same memory
why:     one anchor for fusion and one operand order for packing
legal:   the matrix is constant and has two axes; alpha and beta of addmm are 1; a bias is a constant of n
         features and its linear has none yet and no other user; the two reshapes only merge and restore
         leading axes
source:  canonicalisation as in MLIR
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import fx

from torchweld.graph.match import argument, aten, dtype_of, is_call, is_tensor, rank_of, shape_of
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

NAME: Final = "canonicalize_linear"
EXACTNESS: Exactness = "reassoc"

DEQUANTIZE: Final = "torchweld::dequantize"


def is_constant_matrix(node: object) -> bool:
    """A weight of two axes: a get_attr, stored bytes being decoded, or a transposed view of one."""
    if not isinstance(node, fx.Node) or not is_tensor(node) or rank_of(node) != 2:
        return False
    if is_call(node, aten.permute.default):
        return is_constant_matrix(node.args[0])
    if node.op == "call_function" and getattr(node.target, "name", str)() == DEQUANTIZE:
        stored = node.args[0]
        return isinstance(stored, fx.Node) and stored.op == "get_attr"
    return node.op == "get_attr"


def _transposed(weight: fx.Node) -> fx.Node | Spelling:
    """[n, k] from [k, n], undoing a transposition rather than adding a second."""
    if is_call(weight, aten.permute.default):
        axes: Any = weight.args[1]
        if [axis % 2 for axis in axes] == [1, 0] and isinstance(weight.args[0], fx.Node):
            return weight.args[0]
    return Spelling(aten.permute.default, (weight, [1, 0]))


def _matmul(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    x, weight = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or rank_of(weight) != 2:
        return None
    if not is_constant_matrix(weight):
        return Refusal("the right operand is not a constant matrix", node)
    return Spelling(aten.linear.default, (x, _transposed(weight)))


def _addmm(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    bias, x, weight = node.args[:3]
    if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
        return Refusal("addmm has a beta or an alpha", node)
    if not isinstance(weight, fx.Node) or not is_constant_matrix(weight):
        return Refusal("the right operand is not a constant matrix", node)
    if not is_bias(bias, node):
        return Refusal("the added term is not a constant vector of the output features", node)
    return Spelling(aten.linear.default, (x, _transposed(weight), bias))


def is_bias(bias: object, result: fx.Node) -> bool:
    """A constant vector with one number per output feature, in the dtype of the result."""
    return (
        isinstance(bias, fx.Node)
        and bias.op == "get_attr"
        and shape_of(bias) == shape_of(result)[-1:]
        and dtype_of(bias) == dtype_of(result)
    )


def _add(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    for product, bias in (node.args, tuple(reversed(node.args))):
        if not is_call(product, aten.linear.default) or not is_bias(bias, node):
            continue
        assert isinstance(product, fx.Node)
        if argument(product, 2, "bias") is not None:
            return Refusal("the linear has a bias already", node)
        if len(product.users) != 1:
            return Refusal("the linear without the bias is used elsewhere", node)
        return Spelling(aten.linear.default, (product.args[0], product.args[1], bias))
    return None


def _reshape(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """reshape(linear(reshape(x))) without the reshapes that only merge and restore the leading axes."""
    product = node.args[0]
    if not is_call(product, aten.linear.default):
        return None
    assert isinstance(product, fx.Node)
    merged = product.args[0]
    if not is_call(merged, aten.reshape.default):
        return None
    assert isinstance(merged, fx.Node) and isinstance(merged.args[0], fx.Node)
    x = merged.args[0]
    leading = shape_of(x)[:-1]
    if shape_of(x)[-1:] != shape_of(merged)[-1:] or shape_of(node)[: len(leading)] != leading or not leading:
        return Refusal("the reshapes around the linear do more than merge and restore leading axes", node)
    if len(product.users) != 1:
        return Refusal("the linear on the merged axes is used elsewhere", node)
    linear = Spelling(aten.linear.default, (x, *product.args[1:]))
    if shape_of(node) == (*leading, shape_of(product)[-1]):
        return linear
    return Spelling(aten.reshape.default, (linear, node.args[1]))


RULES: Final[dict[Target, Rule]] = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.add.Tensor: _add,
    aten.reshape.default: _reshape,
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Products with a matrix, and what stands around a linear."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the anchor as a linear."""
    apply_rule(graph_module, site, NAME)
