"""Pointwise operations: one output element from the operands' elements at the same (broadcast) index."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from sympy import Integer
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

from torchweld.graph.meaning.context import (
    Index,
    Meaning,
    Rule,
    Unsupported,
    argument,
    compute_dtype,
    index_value,
    shape_of,
    tensor_of,
)
from torchweld.graph.ops import rope as _rope_op  # noqa: F401  registers torchweld::rope
from torchweld.graph.terms import Const, Guard, Term, cast, const, op

aten = torch.ops.aten
DEFAULT = ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
INT_TO_FLOAT = ELEMENTWISE_TYPE_PROMOTION_KIND.INT_TO_FLOAT

Build = Callable[..., Term]


def _number(term: Term, value: float) -> Term:
    return const(value, term.dtype)


def _computation_dtype(args: Sequence[object], kind: ELEMENTWISE_TYPE_PROMOTION_KIND) -> torch.dtype:
    """The dtype that torch's type promotion computes in, for metas and numbers."""
    values = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args]
    computation, _ = elementwise_dtypes(*values, type_promotion_kind=kind)
    return compute_dtype(computation)


def elementwise(
    build: Build, arity: int, kind: ELEMENTWISE_TYPE_PROMOTION_KIND = DEFAULT, numbers: int = 0
) -> Rule:
    """A rule for an operation on `arity` broadcasting operands, followed by `numbers` plain arguments for `build`."""

    def value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
        if len(node.args) > arity + numbers:
            raise Unsupported(f"{node.name}: {node.target} with arguments {node.args[arity + numbers :]}")
        operands = list(node.args[:arity])
        dtype = _computation_dtype(operands, kind)
        out_shape = shape_of(node)
        terms = [meaning.operand(arg, out_shape, index, dtype) for arg in operands]
        extra = list(node.args[arity : arity + numbers])
        result = build(*terms, *extra, **node.kwargs)
        return cast(result, compute_dtype(tensor_of(node).dtype))

    return Rule("pointwise", value)


def _plain(name: str) -> Build:
    def build(*terms: Term) -> Term:
        return op(name, *terms)

    return build


def _scaled_binary(name: str) -> Build:
    def build(a: Term, b: Term, *, alpha: float = 1) -> Term:
        return op(name, a, b if alpha == 1 else op("mul", b, _number(b, alpha)))

    return build


def _rsub(a: Term, b: Term, alpha: float = 1) -> Term:
    return op("sub", b, a if alpha == 1 else op("mul", a, _number(a, alpha)))


def _divide(a: Term, b: Term, *, rounding_mode: str | None = None) -> Term:
    if rounding_mode is None:
        return op("div", a, b)
    if rounding_mode == "floor":
        return op("floordiv", a, b)
    if a.dtype.is_floating_point:
        return op("trunc", op("div", a, b))
    quotient = op("floordiv", op("abs", a), op("abs", b))
    signs_differ = op("xor", op("lt", a, _number(a, 0)), op("lt", b, _number(b, 0)))
    return op("where", signs_differ, op("neg", quotient), quotient)


def _silu(x: Term) -> Term:
    return op("mul", x, op("sigmoid", x))


def _gelu(x: Term, *, approximate: str = "none") -> Term:
    half_x = op("mul", x, _number(x, 0.5))
    if approximate == "tanh":
        cube = op("mul", op("mul", x, x), x)
        inner = op(
            "mul", op("add", x, op("mul", cube, _number(x, 0.044715))), _number(x, math.sqrt(2 / math.pi))
        )
        return op("mul", half_x, op("add", op("tanh", inner), _number(x, 1.0)))
    return op("mul", half_x, op("add", op("erf", op("mul", x, _number(x, math.sqrt(0.5)))), _number(x, 1.0)))


def _clamp(x: Term, low: Term | None, high: Term | None) -> Term:
    if low is not None:
        x = op("max", x, low)
    return x if high is None else op("min", x, high)


def _leaky_relu(x: Term, slope: float = 0.01) -> Term:
    return op("where", op("gt", x, _number(x, 0)), x, op("mul", x, _number(x, slope)))


def _elu(x: Term, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Term:
    low = op("mul", op("expm1", op("mul", x, _number(x, input_scale))), _number(x, alpha * scale))
    return op("where", op("gt", x, _number(x, 0)), op("mul", x, _number(x, scale)), low)


def _softplus(x: Term, beta: float = 1.0, threshold: float = 20.0) -> Term:
    scaled = op("mul", x, _number(x, beta))
    soft = op("div", op("log1p", op("exp", op("min", scaled, _number(x, threshold)))), _number(x, beta))
    return op("where", op("gt", scaled, _number(x, threshold)), x, soft)


def _hardtanh(x: Term, low: float = -1.0, high: float = 1.0) -> Term:
    return _clamp(x, _number(x, low), _number(x, high))


def _hardsigmoid(x: Term) -> Term:
    return op("div", _clamp(op("add", x, _number(x, 3)), _number(x, 0), _number(x, 6)), _number(x, 6))


def _square(x: Term) -> Term:
    return op("mul", x, x)


def _pow(a: Term, b: Term) -> Term:
    value = b.value if isinstance(b, Const) else None
    simple: Mapping[float, Callable[[Term], Term]] = {
        1: lambda x: x,
        2: _square,
        3: lambda x: op("mul", _square(x), x),
        0.5: lambda x: op("sqrt", x),
        -0.5: lambda x: op("rsqrt", x),
        -1: lambda x: op("reciprocal", x),
    }
    if value is not None and value in simple and (a.dtype.is_floating_point or value in (1, 2, 3)):
        return simple[value](a)
    return op("pow", a, b)


def _truth(x: Term) -> Term:
    return x if x.dtype == torch.bool else op("ne", x, _number(x, 0))


def _logical(name: str) -> Build:
    def build(a: Term, b: Term) -> Term:
        return op(name, _truth(a), _truth(b), dtype=torch.bool)

    return build


def _logical_not(a: Term) -> Term:
    return op("not", _truth(a))


def _bitwise_not(a: Term) -> Term:
    return op("not", a) if a.dtype == torch.bool else op("bitwise_not", a)


def _fmod(a: Term, b: Term) -> Term:
    return op("sub", a, op("mul", b, _divide(a, b, rounding_mode="trunc")))


def _add_product(x: Term, a: Term, b: Term, *, value: float = 1) -> Term:
    product = op("mul", a, b)
    return op("add", x, product if value == 1 else op("mul", product, _number(x, value)))


def _add_quotient(x: Term, a: Term, b: Term, *, value: float = 1) -> Term:
    return op("add", x, op("mul", op("div", a, b), _number(x, value)))


def _lerp(a: Term, b: Term, weight: Term) -> Term:
    return op("add", a, op("mul", weight, op("sub", b, a)))


def _logit(x: Term, eps: float | None = None) -> Term:
    if eps is not None:
        x = _clamp(x, _number(x, eps), _number(x, 1 - eps))
    return op("log", op("div", x, op("sub", _number(x, 1), x)))


def _nan_to_num(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """Infinities become the ends of the tensor's own dtype, not of the one that it is computed in."""
    x, dtype = meaning.value(node.args[0], index), tensor_of(node).dtype
    if not dtype.is_floating_point:
        return x
    nan, top, bottom = (
        argument(node, place, name) for place, name in ((1, "nan"), (2, "posinf"), (3, "neginf"))
    )
    limits = torch.finfo(dtype)
    result = op("where", op("isnan", x), _filling(x, nan, 0.0), x)
    result = op("where", op("eq", x, _number(x, math.inf)), _filling(x, top, limits.max), result)
    return op("where", op("eq", x, _number(x, -math.inf)), _filling(x, bottom, limits.min), result)


def _filling(x: Term, given: object, default: float) -> Term:
    return _number(x, given if isinstance(given, (int, float)) else default)


def _copy(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """A copy, with or without a change of dtype; narrowing to 16 bits rounds here, as the user asked for it."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise Unsupported(f"{node.name}: copies {source!r}, expected a tensor")
    value = meaning.value(source, index)
    target, origin = tensor_of(node).dtype, tensor_of(source).dtype
    if target != origin and target in (torch.float16, torch.bfloat16):
        return cast(cast(value, target), torch.float32)
    return cast(value, compute_dtype(target))


def _same(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    return meaning.value(node.args[0], index)


def _dropout(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    if argument(node, 2, "train", False):
        raise Unsupported(f"{node.name}: dropout in training mode draws random numbers")
    return meaning.value(node.args[0], index)


def _where(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    condition, yes, no = node.args[:3]
    shape, dtype = shape_of(node), compute_dtype(tensor_of(node).dtype)
    chosen = meaning.operand(condition, shape, index, torch.bool)
    return op(
        "where", chosen, meaning.operand(yes, shape, index, dtype), meaning.operand(no, shape, index, dtype)
    )


def _masked_fill(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source, mask, fill = node.args[:3]
    shape, dtype = shape_of(node), compute_dtype(tensor_of(node).dtype)
    chosen = meaning.operand(mask, shape, index, torch.bool)
    return op(
        "where",
        chosen,
        meaning.operand(fill, shape, index, dtype),
        meaning.operand(source, shape, index, dtype),
    )


def _clamp_rule(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = node.args[0]
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    given = [arg for arg in (source, low, high) if arg is not None]
    dtype, shape = _computation_dtype(given, DEFAULT), shape_of(node)
    bounds = [None if bound is None else meaning.operand(bound, shape, index, dtype) for bound in (low, high)]
    result = _clamp(meaning.operand(source, shape, index, dtype), *bounds)
    return cast(result, compute_dtype(tensor_of(node).dtype))


def _rope(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """torchweld::rope: the partner feature is another index, so no cat and no slice is left."""
    x, cos, sin, interleaved = node.args
    assert isinstance(x, fx.Node) and isinstance(cos, fx.Node)
    shape, rotated = shape_of(x), shape_of(cos)[-1]
    dtype = compute_dtype(tensor_of(node).dtype)
    d = index[-1]
    position = index_value(d)
    if interleaved:
        is_first = op("eq", op("and", position, const(1, torch.int64)), const(0, torch.int64))
        partner = meaning.ranges.floordiv(d, Integer(2)) * 4 + 1 - d  # 2i -> 2i+1 -> 2i
    else:
        half = meaning.ranges.floordiv(rotated, Integer(2))
        is_first = op("lt", position, index_value(half))
        partner = meaning.ranges.mod(d + half, rotated)
    rotated_shape = (*shape[:-1], rotated)
    value = cast(meaning.value(x, index), dtype)
    other = cast(meaning.value(x, (*index[:-1], partner)), dtype)
    other = op("where", is_first, op("neg", other), other)
    c, s = (meaning.operand(table, rotated_shape, index, dtype) for table in (cos, sin))
    result = op("add", op("mul", value, c), op("mul", other, s))
    if rotated == shape[-1]:
        return result
    return Guard(dtype, op("lt", position, index_value(rotated)), result, value)


_UNARY = {
    "neg": DEFAULT, "abs": DEFAULT, "floor": DEFAULT, "ceil": DEFAULT, "round": DEFAULT, "trunc": DEFAULT,
    "sign": DEFAULT, "relu": DEFAULT, "exp": INT_TO_FLOAT, "exp2": INT_TO_FLOAT, "log": INT_TO_FLOAT,
    "log2": INT_TO_FLOAT, "log1p": INT_TO_FLOAT, "expm1": INT_TO_FLOAT, "sqrt": INT_TO_FLOAT, "rsqrt": INT_TO_FLOAT,
    "reciprocal": INT_TO_FLOAT, "tanh": INT_TO_FLOAT, "sigmoid": INT_TO_FLOAT, "erf": INT_TO_FLOAT,
    "sin": INT_TO_FLOAT, "cos": INT_TO_FLOAT, "isnan": DEFAULT, "isinf": DEFAULT,
}  # fmt: skip
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _table() -> dict[object, Rule]:
    rules: dict[object, Rule] = {
        getattr(aten, n).default: elementwise(_plain(n), 1, k) for n, k in _UNARY.items()
    }
    for name in _COMPARISONS:
        for overload in ("Tensor", "Scalar"):
            rules[getattr(getattr(aten, name), overload)] = elementwise(_plain(name), 2)
    for name in ("and", "or", "xor"):
        rules[getattr(aten, f"logical_{name}").default] = elementwise(_logical(name), 2)
        for overload in ("Tensor", "Scalar"):
            rules[getattr(getattr(aten, f"bitwise_{name}"), overload)] = elementwise(_plain(name), 2)
            rules[getattr(getattr(aten, f"__{name}__"), overload)] = elementwise(_plain(name), 2)
    for packet, build in ((aten.add, _scaled_binary("add")), (aten.sub, _scaled_binary("sub"))):
        rules[packet.Tensor] = elementwise(build, 2)
        rules[packet.Scalar] = elementwise(build, 2)
    for overload in ("Tensor", "Scalar"):
        rules[getattr(aten.mul, overload)] = elementwise(_plain("mul"), 2)
        rules[getattr(aten.div, overload)] = elementwise(_divide, 2, INT_TO_FLOAT)
        rules[getattr(aten.true_divide, overload)] = elementwise(_divide, 2, INT_TO_FLOAT)
        rules[getattr(aten.div, f"{overload}_mode")] = elementwise(_divide, 2)
        rules[getattr(aten.rsub, overload)] = elementwise(_rsub, 2, numbers=1)
        rules[getattr(aten.remainder, overload)] = elementwise(_plain("mod"), 2)
        rules[getattr(aten.fmod, overload)] = elementwise(_fmod, 2)
    rules |= {
        aten.floor_divide.default: elementwise(_plain("floordiv"), 2),
        aten.floor_divide.Scalar: elementwise(_plain("floordiv"), 2),
        aten.pow.Tensor_Scalar: elementwise(_pow, 2),
        aten.pow.Tensor_Tensor: elementwise(_pow, 2),
        aten.pow.Scalar: elementwise(_pow, 2),
        aten.maximum.default: elementwise(_plain("max"), 2),
        aten.minimum.default: elementwise(_plain("min"), 2),
        aten.max.other: elementwise(_plain("max"), 2),
        aten.min.other: elementwise(_plain("min"), 2),
        aten.atan2.default: elementwise(_plain("atan2"), 2, INT_TO_FLOAT),
        aten.logical_not.default: elementwise(_logical_not, 1),
        aten.bitwise_not.default: elementwise(_bitwise_not, 1),
        aten.silu.default: elementwise(_silu, 1),
        aten.gelu.default: elementwise(_gelu, 1),
        aten.square.default: elementwise(_square, 1),
        aten.leaky_relu.default: elementwise(_leaky_relu, 1, numbers=1),
        aten.elu.default: elementwise(_elu, 1, numbers=3),
        aten.softplus.default: elementwise(_softplus, 1, numbers=2),
        aten.hardtanh.default: elementwise(_hardtanh, 1, numbers=2),
        aten.relu6.default: elementwise(lambda x: _hardtanh(x, 0.0, 6.0), 1),
        aten.hardsigmoid.default: elementwise(_hardsigmoid, 1),
        aten.hardswish.default: elementwise(lambda x: op("mul", x, _hardsigmoid(x)), 1),
        aten.log_sigmoid.default: elementwise(lambda x: op("neg", _softplus(op("neg", x))), 1),
        aten.logit.default: elementwise(_logit, 1, INT_TO_FLOAT, numbers=1),
        aten.nan_to_num.default: Rule("pointwise", _nan_to_num),
        aten.addcmul.default: elementwise(_add_product, 3),
        aten.addcdiv.default: elementwise(_add_quotient, 3),
        aten.lerp.Scalar: elementwise(_lerp, 3),
        aten.lerp.Tensor: elementwise(_lerp, 3),
        aten.where.self: Rule("pointwise", _where),
        aten.where.ScalarSelf: Rule("pointwise", _where),
        aten.where.ScalarOther: Rule("pointwise", _where),
        aten.where.Scalar: Rule("pointwise", _where),
        aten.masked_fill.Scalar: Rule("pointwise", _masked_fill),
        aten.masked_fill.Tensor: Rule("pointwise", _masked_fill),
        aten.clamp.default: Rule("pointwise", _clamp_rule),
        aten.clamp.Tensor: Rule("pointwise", _clamp_rule),
        aten.clamp_min.default: Rule("pointwise", _clamp_rule),
        aten.clamp_max.default: elementwise(_plain("min"), 2),
        aten._to_copy.default: Rule("pointwise", _copy),
        aten.to.dtype: Rule("pointwise", _copy),
        aten.to.dtype_layout: Rule("pointwise", _copy),
        aten.to.device: Rule("pointwise", _copy),
        aten.to.other: Rule("pointwise", _copy),
        aten.type_as.default: Rule("pointwise", _copy),
        aten.clone.default: Rule("view", _same),
        aten.contiguous.default: Rule("view", _same),
        aten.alias.default: Rule("view", _same),
        aten.detach.default: Rule("view", _same),
        aten.detach_.default: Rule("view", _same),
        aten.lift_fresh_copy.default: Rule("view", _same),
        aten.dropout.default: Rule("view", _dropout),
        torch.ops.torchweld.rope.default: Rule("pointwise", _rope),
    }
    return rules


POINTWISE = _table()
