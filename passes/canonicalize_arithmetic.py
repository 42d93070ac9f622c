"""One spelling for elementwise arithmetic.

before:  add.Scalar, mul.Scalar ...; rsub(x, c); true_divide; square, pow(x, 2), pow(x, 0.5); x * -1; & and
         | on booleans; masked_fill(x, m, c); bmm; baddbmm(b, p, q)
after:   the .Tensor overload; c + neg(x); div; mul(x, x); sqrt; neg; logical_and, logical_or, logical_not;
         where(m, c, x); matmul; add(beta * b, alpha * matmul(p, q))
why:     patterns are written once
legal:   the result is the same bit for bit (a power that torch computes by the same multiplication); no
         alpha where the other spelling has none; the filled value is a number
source:  canonicalisation as in MLIR
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import argument, aten, constant_number, dtype_of, is_tensor, same_shape
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

NAME: Final = "canonicalize_arithmetic"
EXACTNESS: Exactness = "reassoc"  # baddbmm rounds once where add and matmul round twice; the rest is exact


def _overload(target: Target) -> Rule:
    def rule(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
        return Spelling(target, node.args, node.kwargs)

    return rule


def _reverse_subtraction(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    if argument(node, 2, "alpha", 1) != 1:
        return Refusal("rsub has an alpha", node)
    subtrahend, minuend = node.args[:2]
    if not isinstance(subtrahend, fx.Node) or dtype_of(subtrahend) == torch.bool:
        return Refusal("rsub of booleans", node)
    if is_tensor(minuend):
        return Spelling(aten.sub.Tensor, (minuend, subtrahend))
    return Spelling(aten.add.Tensor, (Spelling(aten.neg.default, (subtrahend,)), minuend))


def _power(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    base, exponent = node.args[0], constant_number(graph_module, node.args[1])
    if not isinstance(base, fx.Node) or dtype_of(base) != dtype_of(node) or not same_shape(base, node):
        return None
    if exponent == 2:
        return Spelling(aten.mul.Tensor, (base, base))
    if exponent == 0.5:
        return Spelling(aten.sqrt.default, (base,))
    if exponent == -0.5:
        return Spelling(aten.rsqrt.default, (base,))
    return None


def _square(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    return Spelling(aten.mul.Tensor, (node.args[0], node.args[0]))


def _multiply(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    for operand, number in (node.args, tuple(reversed(node.args))):
        if (
            constant_number(graph_module, number) == -1
            and isinstance(operand, fx.Node)
            and is_tensor(operand)
        ):
            if same_shape(operand, node) and dtype_of(operand) == dtype_of(node):
                return Spelling(aten.neg.default, (operand,))
    return None


def _logical(target: Target) -> Rule:
    """Bitwise operators mean logic on booleans; on integers they stay."""

    def rule(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
        return Spelling(target, node.args) if all(map(_is_boolean, node.args)) else None

    return rule


def _is_boolean(value: object) -> bool:
    return isinstance(value, fx.Node) and is_tensor(value) and dtype_of(value) == torch.bool


def _masked_fill(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    source, mask, value = node.args
    number = _fill_value(graph_module, value)
    if number is None:
        return Refusal("the value that fills is not a constant number", node)
    if not isinstance(source, fx.Node) or not same_shape(source, node):
        return Refusal("masked_fill widens its input", node)
    return Spelling(aten.where.ScalarSelf, (mask, number, source))


def _fill_value(graph_module: fx.GraphModule, value: object) -> float | int | bool | None:
    return value if isinstance(value, bool) else constant_number(graph_module, value)


def _where(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    """where(m, x, constant tensor) and where(m, constant tensor, x) with a scalar in place of the tensor."""
    mask, chosen, other = node.args
    first, second = constant_number(graph_module, chosen), constant_number(graph_module, other)
    if second is not None and first is None and _keeps(chosen, node):
        return Spelling(aten.where.ScalarOther, (mask, chosen, second))
    if first is not None and second is None and _keeps(other, node):
        return Spelling(aten.where.ScalarSelf, (mask, first, other))
    return None


def _keeps(operand: object, node: fx.Node) -> bool:
    """A scalar does not widen the dtype, a tensor might."""
    return isinstance(operand, fx.Node) and dtype_of(operand) == dtype_of(node)


def _batched_product(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    """baddbmm(b, p, q) = beta * b + alpha * (p @ q)."""
    bias, first, second = node.args[:3]
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    product: Any = Spelling(aten.matmul.default, (first, second))
    product = product if alpha == 1 else Spelling(aten.mul.Tensor, (product, alpha))
    if beta == 0:  # torch ignores the bias then, NaN and all
        return product if isinstance(product, Spelling) else Spelling(aten.matmul.default, (first, second))
    added: Any = bias if beta == 1 else Spelling(aten.mul.Tensor, (bias, beta))
    return Spelling(aten.add.Tensor, (product, added))


RULES: Final[dict[Target, Rule]] = {
    aten.add.Scalar: _overload(aten.add.Tensor),
    aten.sub.Scalar: _overload(aten.sub.Tensor),
    aten.mul.Scalar: _overload(aten.mul.Tensor),
    aten.div.Scalar: _overload(aten.div.Tensor),
    aten.true_divide.Tensor: _overload(aten.div.Tensor),
    aten.divide.Tensor: _overload(aten.div.Tensor),
    aten.multiply.Tensor: _overload(aten.mul.Tensor),
    aten.subtract.Tensor: _overload(aten.sub.Tensor),
    aten.negative.default: _overload(aten.neg.default),
    aten.absolute.default: _overload(aten.abs.default),
    aten.bmm.default: _overload(aten.matmul.default),
    aten.baddbmm.default: _batched_product,
    aten.rsub.Scalar: _reverse_subtraction,
    aten.rsub.Tensor: _reverse_subtraction,
    aten.pow.Tensor_Scalar: _power,
    aten.square.default: _square,
    aten.mul.Tensor: _multiply,
    **dict.fromkeys((aten.__and__.Tensor, aten.bitwise_and.Tensor), _logical(aten.logical_and.default)),
    **dict.fromkeys((aten.__or__.Tensor, aten.bitwise_or.Tensor), _logical(aten.logical_or.default)),
    aten.bitwise_not.default: _logical(aten.logical_not.default),
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.where.self: _where,
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Calls with another spelling."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the anchor."""
    apply_rule(graph_module, site, NAME)
