"""Single operations of random programs: one function per operand rule, one table row per ATen operation.

A builder function picks its operands, emits one operation (some need a cast or a clamp first) and may raise
Rejected. Operations that jump (floor, ==, argmax) only take `exact` values: elsewhere float32 and float64 may
differ rightly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from tests.generators.builder import Builder, Rejected, Value

aten = torch.ops.aten
Target = Callable[..., object]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INFINITY = float("inf")

#: kind -> (operation, arguments after the operand, smallest and largest operand)
_UNARY: Mapping[str, tuple[Target, tuple[object, ...], float, float]] = MappingProxyType(
    {
        "neg": (aten.neg.default, (), -_INFINITY, _INFINITY),
        "abs": (aten.abs.default, (), -_INFINITY, _INFINITY),
        "relu": (aten.relu.default, (), -_INFINITY, _INFINITY),
        "tanh": (aten.tanh.default, (), -_INFINITY, _INFINITY),
        "sigmoid": (aten.sigmoid.default, (), -_INFINITY, _INFINITY),
        "silu": (aten.silu.default, (), -_INFINITY, _INFINITY),
        "gelu": (aten.gelu.default, (), -_INFINITY, _INFINITY),
        "erf": (aten.erf.default, (), -_INFINITY, _INFINITY),
        "softplus": (aten.softplus.default, (), -_INFINITY, _INFINITY),
        "sin": (aten.sin.default, (), -20.0, 20.0),
        "cos": (aten.cos.default, (), -20.0, 20.0),
        "exp": (aten.exp.default, (), -20.0, 3.0),
        "square": (aten.pow.Tensor_Scalar, (2,), -10.0, 10.0),
        "pow_scalar": (aten.pow.Tensor_Scalar, (3,), -4.0, 4.0),
        "log": (aten.log.default, (), 0.05, _INFINITY),
        "sqrt": (aten.sqrt.default, (), 0.01, _INFINITY),
        "rsqrt": (aten.rsqrt.default, (), 0.05, _INFINITY),
        "reciprocal": (aten.reciprocal.default, (), 0.1, _INFINITY),
        "pow_half": (aten.pow.Tensor_Scalar, (0.5,), 0.01, _INFINITY),
    }
)
_EXACT_UNARY = frozenset({"neg", "abs", "relu"})


def _unary(kind: str, b: Builder) -> Value:
    target, extra, low, high = _UNARY[kind]
    x = b.any_float()
    if x.low < low or x.high > high:
        # Bring the operand into the domain the way models do: a clamp, or a positive function plus epsilon.
        x = _positive(b, x) if low > 0.0 else b.call("clamp", aten.clamp.default, x, low, high)
    return b.call(kind, target, x, *extra, exact=x.exact and kind in _EXACT_UNARY)


def _positive(b: Builder, x: Value) -> Value:
    return b.call("add_scalar", aten.add.Tensor, b.call("abs", aten.abs.default, x, exact=x.exact), 0.5)


def _gelu_tanh(b: Builder) -> Value:
    return b.call("gelu_tanh", aten.gelu.default, b.any_float(), approximate="tanh")


def _partner(b: Builder, x: Value, low: float = -2.0, high: float = 2.0) -> Value:
    """Return a value that broadcasts with x and keeps its shape: an earlier one, or a weight with some sizes
    1."""
    if b.chance(60):
        return b.any(
            lambda v: v.is_float and _broadcasts(v.shape, x.shape) and low <= v.low and v.high <= high
        )
    drop = b.chooser.integer(0, len(x.shape))
    shape = [1 if b.chance(25) else size for size in x.shape[drop:]]
    return b.weight(*shape, low=low, high=high, dtype=x.dtype)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, to)) == to
    except RuntimeError:
        return False


def _binary(kind: str, target: Target, b: Builder) -> Value:
    x = b.any_float()
    y = _partner(b, x, 0.25, 4.0) if kind == "div" else _partner(b, x, -20.0, 20.0)
    first, second = (y, x) if kind != "div" and b.chance(30) else (x, y)
    chooses = kind in ("maximum", "minimum") and x.dtype == y.dtype
    return b.call(kind, target, first, second, exact=chooses and x.exact and y.exact)


def _add_alpha(b: Builder) -> Value:
    x = b.any_float()
    return b.call(
        "add_alpha", b.pick(aten.add.Tensor, aten.sub.Tensor), x, _partner(b, x), alpha=b.pick(2, -0.5)
    )


def _scalar(kind: str, target: Target, b: Builder) -> Value:
    return b.call(kind, target, b.any_float(), b.pick(0.5, 2, 1, -1.25, 3))


def _clamp(b: Builder) -> Value:
    x = b.any_float()
    return b.call("clamp", aten.clamp.default, x, b.pick(-1.0, None, -0.5), b.pick(1.0, 0.5), exact=x.exact)


def _condition(b: Builder, shape: tuple[int, ...]) -> Value:
    """Return a bool that broadcasts to `shape`: an earlier one or a comparison of a weight."""
    if b.chance(50):
        return b.any(lambda v: v.dtype == torch.bool and _broadcasts(v.shape, shape))
    return b.call("gt", aten.gt.Scalar, b.weight(*shape[-1:], low=-1.0, high=1.0), 0.0, exact=True)


def _where(b: Builder) -> Value:
    x = b.any_float()
    y = _partner(b, x)
    return b.call("where", aten.where.self, _condition(b, x.shape), x, y, exact=x.exact and y.exact)


def _masked_fill(b: Builder) -> Value:
    x = b.any_float()
    return b.call("masked_fill", aten.masked_fill.Scalar, x, _condition(b, x.shape), 0.25, exact=x.exact)


def _exact_float(v: Value) -> bool:
    return v.exact and v.is_float


def _rounding(kind: str, target: Target, b: Builder) -> Value:
    return b.call(kind, target, b.any(_exact_float), exact=True)


def _comparison(kind: str, target: Target, b: Builder) -> Value:
    x = b.any(lambda v: v.exact and v.dtype != torch.bool)
    return b.call(kind, target, x, b.pick(0, 1, -1), exact=True)


def _comparison_tensor(b: Builder) -> Value:
    x = b.any(_exact_float)
    y = b.any(lambda v: _exact_float(v) and _broadcasts(v.shape, x.shape))
    return b.call("lt_tensor", aten.lt.Tensor, x, y, exact=True)


def _logical(kind: str, target: Target, b: Builder) -> Value:
    x = b.any_float()
    first, second = _condition(b, x.shape), _condition(b, x.shape)
    return b.call(kind, target, first, second, exact=True)


def _logical_not(b: Builder) -> Value:
    return b.call("logical_not", aten.logical_not.default, _condition(b, b.any_float().shape), exact=True)


def _cast(b: Builder) -> Value:
    x = b.any(lambda v: v.is_float or v.dtype == torch.bool)
    dtype = b.pick(*_FLOATS)
    widens = x.dtype == torch.bool or dtype in (x.dtype, torch.float32)
    kind, target = b.pick(("to_copy", aten._to_copy.default), ("to_dtype", aten.to.dtype))
    if kind == "to_copy":
        return b.call(kind, target, x, dtype=dtype, exact=x.exact and widens)
    return b.call(kind, target, x, dtype, exact=x.exact and widens)


# --- movement ---


def _dim(b: Builder, x: Value, *, positive: bool = False) -> int:
    """Return a dimension of x whose size is at least 2 if `positive`, counted from the front or the back."""
    dims = [d for d in range(len(x.shape)) if not positive or x.shape[d] >= 2]
    if not dims:
        raise Rejected("no such dimension")
    return b.pick(*dims) - (len(x.shape) if b.chance(50) else 0)


def _reshape(b: Builder) -> Value:
    x = b.any_float(1)
    shapes: list[list[int]] = [[x.tensor.numel()], [*x.shape, 1], [1, *x.shape]]
    if x.tensor.numel():
        shapes += [[-1, x.shape[-1]], [x.shape[0], -1]]
    shapes += [[*x.shape[:-1], x.shape[-1] // f, f] for f in (2, 3) if x.shape[-1] and x.shape[-1] % f == 0]
    kind, target = b.pick(("reshape", aten.reshape.default), ("view", aten.view.default))
    return b.call(kind, target, x, b.pick(*shapes), exact=x.exact)


def _permute(b: Builder) -> Value:
    x = b.any_float(2)
    order = list(range(len(x.shape)))
    for i in range(len(order) - 1, 0, -1):
        j = b.chooser.integer(0, i)
        order[i], order[j] = order[j], order[i]
    return b.call("permute", aten.permute.default, x, order, exact=x.exact)


def _transpose(b: Builder) -> Value:
    x = b.any_float(2)
    if len(x.shape) == 2 and b.chance(30):
        return b.call("t", aten.t.default, x, exact=x.exact)
    return b.call("transpose", aten.transpose.int, x, _dim(b, x), _dim(b, x), exact=x.exact)


def _expand(b: Builder) -> Value:
    x = b.any_float()
    sizes = [b.pick(2, 3, 1) if s == 1 else b.pick(s, -1) for s in x.shape]
    return b.call("expand", aten.expand.default, x, [*b.pick([], [2], [3]), *sizes], exact=x.exact)


def _slice(b: Builder) -> Value:
    x = b.any_float(1)
    dim = _dim(b, x, positive=True)
    start = b.chooser.integer(0, x.shape[dim] - 1)
    end = b.pick(2**63 - 1, x.shape[dim], min(start + 2, x.shape[dim]), -1)
    return b.call("slice", aten.slice.Tensor, x, dim, start, end, b.pick(1, 1, 2), exact=x.exact)


def _select(b: Builder) -> Value:
    x = b.any_float(1)
    return b.call("select", aten.select.int, x, _dim(b, x, positive=True), b.pick(0, -1, 1), exact=x.exact)


def _unsqueeze(b: Builder) -> Value:
    x = b.any_float()
    return b.call("unsqueeze", aten.unsqueeze.default, x, b.chooser.integer(-1, len(x.shape)), exact=x.exact)


def _squeeze(b: Builder) -> Value:
    x = b.any(lambda v: v.is_float and 1 in v.shape)
    return b.call("squeeze", aten.squeeze.dim, x, x.shape.index(1), exact=x.exact)


def _join(kind: str, target: Target, b: Builder) -> Value:
    x = b.any_float(1)
    parts = [x]
    for _ in range(b.pick(1, 2)):
        parts.append(b.any(lambda v: v.shape == x.shape and v.dtype == x.dtype))
    return b.call(kind, target, parts, _dim(b, x), exact=all(p.exact for p in parts))


def _split(b: Builder) -> Value:
    x = b.any_float(1)
    dim = _dim(b, x, positive=True)
    size = x.shape[dim]
    if b.chance(50):
        return b.call_many("split", aten.split.Tensor, x, (size + 1) // 2, dim)[-1]
    return b.call_many("split_with_sizes", aten.split_with_sizes.default, x, [1, size - 1], dim)[-1]


def _movement(kind: str, target: Target, arguments: tuple[object, ...], rank: int, b: Builder) -> Value:
    x = b.any_float(rank)
    return b.call(kind, target, x, *arguments, exact=x.exact)


def _index_select(b: Builder) -> Value:
    x = b.any_float(1)
    dim = _dim(b, x)
    return b.call(
        "index_select", aten.index_select.default, x, dim, b.ids(x.shape[dim], b.size()), exact=x.exact
    )


def _gather(b: Builder) -> Value:
    x = b.any_float(1)
    index = b.ids(x.shape[-1], *x.shape[:-1], b.pick(1, 2, 3))
    return b.call("gather", aten.gather.default, x, -1, index, exact=x.exact)


def _embedding(b: Builder) -> Value:
    ids = b.any(lambda v: v.dtype == torch.int64 and v.low >= 0 and v.high < 33)
    return b.call("embedding", aten.embedding.default, b.weight(33, b.width), ids, exact=True)


def _arange(b: Builder) -> Value:
    x = b.any_float(1)
    positions = b.call("arange", aten.arange.default, x.shape[-1], exact=True)
    scaled = b.call("mul_scalar", aten.mul.Tensor, positions, 0.125)
    return b.call("add", aten.add.Tensor, x, scaled)


def _full(b: Builder) -> Value:
    x = b.any_float()
    constant = b.call("full", aten.full.default, list(x.shape[-1:]), 0.75, dtype=x.dtype, exact=True)
    return b.call("mul", aten.mul.Tensor, x, constant)


# --- reductions, matmuls, norms ---


def _reduction(kind: str, target: Target, b: Builder) -> Value:
    x = b.any_float(1)
    dims = [_dim(b, x)] if b.chance(80) else list(range(len(x.shape)))
    result = b.call(kind, target, x, dims, b.chance(50), exact=kind in ("amax", "amin") and x.exact)
    return result


def _var(b: Builder) -> Value:
    x = b.any(lambda v: v.is_float and v.tensor.dim() >= 1 and v.tensor.numel() > 0)
    return b.call(
        "var", aten.var.correction, x, [_dim(b, x, positive=True)], correction=b.pick(1, 0), keepdim=True
    )


def _argmax(b: Builder) -> Value:
    # Ties are broken differently by different reductions: only distinct values have one argmax.
    x = b.any(
        lambda v: _exact_float(v) and v.tensor.dim() >= 1 and v.tensor.unique().numel() == v.tensor.numel()
    )
    return b.call("argmax", aten.argmax.default, x, -1, b.chance(50), exact=True)


def _along(kind: str, target: Target, b: Builder) -> Value:
    x = b.any_float(1)
    return b.call(kind, target, x, _dim(b, x))


def _linear(b: Builder, bias: bool = False) -> Value:
    x = b.any_float(1)
    features = b.size()
    weight = b.weight(features, x.shape[-1], dtype=x.dtype)
    if not bias:
        return b.call("linear", aten.linear.default, x, weight)
    return b.call(
        "linear_bias", aten.linear.default, x, weight, b.weight(features, low=-1, high=1, dtype=x.dtype)
    )


def _matmul(b: Builder) -> Value:
    x = b.any_float(2)
    weight = b.weight(b.size(), x.shape[-1], dtype=x.dtype)
    return b.call("matmul", aten.matmul.default, x, b.call("t", aten.t.default, weight, exact=True))


def _matrix(b: Builder) -> Value:
    x = b.any_float(1)
    return b.call("reshape", aten.reshape.default, x, [x.tensor.numel() // max(x.shape[-1], 1), x.shape[-1]])


def _mm(b: Builder) -> Value:
    x = _matrix(b)
    return b.call(
        "mm", aten.mm.default, x, b.weight(x.shape[-1], b.size(), dtype=x.dtype, low=-0.5, high=0.5)
    )


def _addmm(b: Builder) -> Value:
    x, features = _matrix(b), b.size()
    weight = b.weight(x.shape[-1], features, dtype=x.dtype, low=-0.5, high=0.5)
    return b.call("addmm", aten.addmm.default, b.weight(features, low=-1, high=1, dtype=x.dtype), x, weight)


def _bmm(b: Builder) -> Value:
    x = b.any(lambda v: v.is_float and v.tensor.dim() == 3)
    y = b.any(lambda v: v.dtype == x.dtype and v.tensor.dim() == 3 and v.shape[0] == x.shape[0])
    if y.shape[1] != x.shape[2]:
        y = b.weight(x.shape[0], x.shape[2], b.size(), dtype=x.dtype, low=-0.5, high=0.5)
    return b.call("bmm", aten.bmm.default, x, y)


def _layer_norm(b: Builder) -> Value:
    x = b.any_float(1)
    weight = b.weight(x.shape[-1], low=0.5, high=1.5, dtype=x.dtype)
    bias = b.weight(x.shape[-1], low=-0.5, high=0.5, dtype=x.dtype)
    affine = b.pick((weight, bias), (weight, None), (None, None))
    return b.call("layer_norm", aten.layer_norm.default, x, [x.shape[-1]], *affine, b.pick(1e-5, 1e-2))


def _rms_norm(b: Builder) -> Value:
    x = b.any_float(1)
    weight = b.weight(x.shape[-1], low=0.5, high=1.5, dtype=x.dtype) if b.chance(80) else None
    return b.call("rms_norm", aten.rms_norm.default, x, [x.shape[-1]], weight, b.pick(1e-6, 1e-2))


#: kind -> the function that adds one such operation to a program
OPERATIONS: Mapping[str, Callable[[Builder], object]] = MappingProxyType(
    {
        **{kind: partial(_unary, kind) for kind in _UNARY},
        "gelu_tanh": _gelu_tanh,
        "add": partial(_binary, "add", aten.add.Tensor),
        "sub": partial(_binary, "sub", aten.sub.Tensor),
        "mul": partial(_binary, "mul", aten.mul.Tensor),
        "div": partial(_binary, "div", aten.div.Tensor),
        "maximum": partial(_binary, "maximum", aten.maximum.default),
        "minimum": partial(_binary, "minimum", aten.minimum.default),
        "add_alpha": _add_alpha,
        "add_scalar": partial(_scalar, "add_scalar", aten.add.Tensor),
        "mul_scalar": partial(_scalar, "mul_scalar", aten.mul.Tensor),
        "div_scalar": partial(_scalar, "div_scalar", aten.div.Tensor),
        "rsub": partial(_scalar, "rsub", aten.rsub.Scalar),
        "clamp": _clamp,
        "where": _where,
        "masked_fill": _masked_fill,
        "floor": partial(_rounding, "floor", aten.floor.default),
        "round": partial(_rounding, "round", aten.round.default),
        "lt": partial(_comparison, "lt", aten.lt.Scalar),
        "ge": partial(_comparison, "ge", aten.ge.Scalar),
        "eq": partial(_comparison, "eq", aten.eq.Scalar),
        "lt_tensor": _comparison_tensor,
        "logical_and": partial(_logical, "logical_and", aten.logical_and.default),
        "bitwise_or": partial(_logical, "bitwise_or", aten.bitwise_or.Tensor),
        "logical_not": _logical_not,
        "to_copy": _cast,
        "reshape": _reshape,
        "permute": _permute,
        "transpose": _transpose,
        "expand": _expand,
        "slice": _slice,
        "select": _select,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        "cat": partial(_join, "cat", aten.cat.default),
        "stack": partial(_join, "stack", aten.stack.default),
        "split": _split,
        "flip": partial(_movement, "flip", aten.flip.default, ([-1],), 1),
        "clone": partial(_movement, "clone", aten.clone.default, (), 0),
        "pad": partial(_movement, "pad", aten.constant_pad_nd.default, ([1, 2],), 1),
        "tril": partial(_movement, "tril", aten.tril.default, (), 2),
        "index_select": _index_select,
        "gather": _gather,
        "embedding": _embedding,
        "arange": _arange,
        "full": _full,
        "sum": partial(_reduction, "sum", aten.sum.dim_IntList),
        "mean": partial(_reduction, "mean", aten.mean.dim),
        "amax": partial(_reduction, "amax", aten.amax.default),
        "amin": partial(_reduction, "amin", aten.amin.default),
        "var": _var,
        "argmax": _argmax,
        "softmax": partial(_along, "softmax", aten.softmax.int),
        "log_softmax": partial(_along, "log_softmax", aten.log_softmax.int),
        "cumsum": partial(_along, "cumsum", aten.cumsum.default),
        "linear": _linear,
        "linear_bias": partial(_linear, bias=True),
        "matmul": _matmul,
        "mm": _mm,
        "addmm": _addmm,
        "bmm": _bmm,
        "layer_norm": _layer_norm,
        "rms_norm": _rms_norm,
    }
)
