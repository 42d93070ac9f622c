"""Name activations that the source model spells out.

before:  x * sigmoid(x);  0.5 * x * (1 + erf(x / sqrt(2)));  0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715
         x^3))) in any order and association;  clamp_min(x, 0)
after:   silu(x);  gelu(x);  gelu(x, approximate="tanh");  relu(x)
why:     one op has one kernel and one error bound, and a gated MLP is then act(linear) * linear
legal:   the constants are those of the formula to seven digits; the argument of erf or tanh is that
         polynomial of the same x that is multiplied
source:  Hendrycks and Gimpel, GELU (2016); Elfwing et al., SiLU (2017)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from torch import fx

from torchweld.graph.match import aten, close, constant_number, is_call, is_tensor, operands, same_shape
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

NAME: Final = "canonicalize_activations"
EXACTNESS: Exactness = "reassoc"

Polynomial = dict[int, float]
"""Coefficient by power of one variable."""

MAX_DEPTH = 8  # the deepest spelling in use (GPT-2's) has 4 levels; the bound keeps long chains linear


def factors(
    graph_module: fx.GraphModule, node: fx.Node, depth: int = MAX_DEPTH
) -> tuple[float, list[fx.Node]]:
    """`node` as (c, [f, ...]) with value c * f * ..., looking through products and divisions by constants."""
    if depth and is_call(node, aten.mul.Tensor) and not node.kwargs:
        scale = 1.0
        parts: list[fx.Node] = []
        for operand in node.args:
            number = constant_number(graph_module, operand)
            if number is not None:
                scale *= number
            elif isinstance(operand, fx.Node):
                inner_scale, inner = factors(graph_module, operand, depth - 1)
                scale, parts = scale * inner_scale, parts + inner
        return scale, parts
    if depth and is_call(node, aten.div.Tensor) and not node.kwargs and isinstance(node.args[0], fx.Node):
        divisor = constant_number(graph_module, node.args[1])
        if divisor:
            scale, parts = factors(graph_module, node.args[0], depth - 1)
            return scale / divisor, parts
    return 1.0, [node]


def polynomial(
    graph_module: fx.GraphModule, node: object, x: fx.Node, depth: int = MAX_DEPTH
) -> Polynomial | None:
    """`node` as a polynomial of `x`, or None if something else is in it."""
    if node is x:
        return {1: 1.0}
    number = constant_number(graph_module, node)
    if number is not None:
        return {0: float(number)}
    if not depth or not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 2:
        return None
    if is_call(node, aten.pow.Tensor_Scalar):
        base = polynomial(graph_module, node.args[0], x, depth - 1)
        exponent = constant_number(graph_module, node.args[1])
        if base is None or exponent is None or len(base) != 1 or exponent not in (2, 3):
            return None
        ((power, coefficient),) = base.items()
        return {power * int(exponent): coefficient ** int(exponent)}
    left = polynomial(graph_module, node.args[0], x, depth - 1)
    right = polynomial(graph_module, node.args[1], x, depth - 1) if left is not None else None
    if left is None or right is None:
        return None
    if is_call(node, aten.add.Tensor):
        return {power: left.get(power, 0.0) + right.get(power, 0.0) for power in left.keys() | right.keys()}
    if is_call(node, aten.mul.Tensor):
        product: Polynomial = {}
        for power, coefficient in left.items():
            for other, factor in right.items():
                product[power + other] = product.get(power + other, 0.0) + coefficient * factor
        return product
    if is_call(node, aten.div.Tensor) and right.keys() == {0} and right[0]:
        return {power: coefficient / right[0] for power, coefficient in left.items()}
    return None


def _product(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    pair = operands(node)
    if pair is None:
        return None
    for gate, x in (pair, pair[::-1]):
        if is_call(gate, aten.sigmoid.default) and gate.args[0] is x:
            return Spelling(aten.silu.default, (x,))
    return _gelu(graph_module, node)


def _gelu(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """c * x * (1 + f(p(x))) with c = 0.5, as the topmost product only: that one has all factors."""
    scale, parts = factors(graph_module, node)
    if len(parts) != 2:
        return None
    for gate, x in ((parts[0], parts[1]), (parts[1], parts[0])):
        bent = _one_plus(graph_module, gate)
        if bent is None or not is_tensor(x) or not same_shape(x, node):
            continue
        if not close(scale, 0.5):
            return None  # an inner product; the 0.5 is outside
        inner = polynomial(graph_module, bent.args[0], x)
        if inner is None:
            return Refusal(f"the argument of {bent.name} is no polynomial of the factor {x.name}", node)
        if is_call(bent, aten.erf.default) and _is_polynomial(inner, {1: math.sqrt(0.5)}):
            return Spelling(aten.gelu.default, (x,))
        root = math.sqrt(2 / math.pi)
        if is_call(bent, aten.tanh.default) and _is_polynomial(inner, {1: root, 3: root * 0.044715}):
            return Spelling(aten.gelu.default, (x,), {"approximate": "tanh"})
        return Refusal(f"the constants at {bent.name} are not those of GELU", node)
    return None


def _one_plus(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The erf or tanh in 1 + erf(...) or 1 + tanh(...)."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return None
    for bent, number in (node.args, tuple(reversed(node.args))):
        if constant_number(graph_module, number) == 1 and is_call(bent, aten.erf.default, aten.tanh.default):
            return bent if isinstance(bent, fx.Node) else None
    return None


def _is_polynomial(found: Polynomial, expected: Polynomial) -> bool:
    found = {power: coefficient for power, coefficient in found.items() if coefficient}
    return found.keys() == expected.keys() and all(close(found[power], expected[power]) for power in expected)


def _clamp(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    return Spelling(aten.relu.default, (node.args[0],)) if low == 0 and high is None else None


RULES: Final[dict[Target, Rule]] = {
    aten.mul.Tensor: _product,
    aten.div.Tensor: _gelu,
    aten.clamp_min.default: _clamp,
    aten.clamp.default: _clamp,
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Products and clamps that may be an activation."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Respell the product."""
    apply_rule(graph_module, site, NAME)
