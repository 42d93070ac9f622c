"""Reductions, softmax and norms: Folds over some dimensions, and pointwise arithmetic around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from torchweld.graph.index import ONE, ZERO
from torchweld.graph.meaning.context import (
    Index,
    Meaning,
    Rule,
    Unsupported,
    argument,
    compute_dtype,
    index_value,
    normalize_dim,
    shape_of,
    tensor_of,
)
from torchweld.graph.terms import Axis, Expr, Fold, Monoid, Term, cast, const, op

aten = torch.ops.aten


def _operand(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _dims(node: fx.Node, rank: int, position: int = 1) -> tuple[int, ...]:
    """The reduced dimensions; none given means all. A single number has none, whatever is given."""
    dims = argument(node, position, "dim")
    if not rank:
        return ()
    if isinstance(dims, int):
        return (normalize_dim(dims, rank),)
    if isinstance(dims, Sequence) and dims:
        return tuple(sorted(normalize_dim(dim, rank) for dim in dims))
    return tuple(range(rank))


def _fold_index(
    meaning: Meaning, source: fx.Node, dims: Sequence[int], index: Index, keepdim: bool
) -> tuple[Index, tuple[Axis, ...]]:
    """The operand's index with loop axes at `dims`; the output's `index` has them as size 1 or not at all."""
    shape = shape_of(source)
    kept = index if not keepdim else tuple(i for dim, i in enumerate(index) if dim not in dims)
    axes = {dim: meaning.shared_axis("k", shape[dim], (source, dim, kept)) for dim in dims}
    rest = list(index)
    inner: list[Expr] = []
    for dim in range(len(shape)):
        if dim in axes:
            inner.append(axes[dim].symbol)
            if keepdim:
                rest.pop(0)
        else:
            inner.append(rest.pop(0))
    return tuple(inner), tuple(axes[dim] for dim in dims)


def _count(shape: Index, dims: Sequence[int], dtype: torch.dtype) -> Term:
    total: Expr = ONE
    for dim in dims:
        total = total * shape[dim]
    return cast(index_value(total), dtype)


def _fold(
    meaning: Meaning,
    source: fx.Node,
    dims: Sequence[int],
    index: Index,
    keepdim: bool,
    kind: str,
    dtype: torch.dtype,
) -> Term:
    inner, axes = _fold_index(meaning, source, dims, index, keepdim)
    body = cast(meaning.value(source, inner), dtype)
    return _folded(dtype, kind, axes, body)


def _folded(dtype: torch.dtype, kind: str, axes: tuple[Axis, ...], body: Term) -> Term:
    """A Fold; without axes, what it gives for a single number.  The largest truth is any, the least all."""
    places = kind in ("argmax", "argmin")
    if not axes:
        return const(0, dtype) if places else body
    if body.dtype == torch.bool:
        kind = {"max": "any", "min": "all"}.get(kind, kind)
        body = cast(body, torch.uint8) if places else body
    return Fold(dtype, Monoid(kind), axes, body)  # type: ignore[arg-type]


def _keepdim(node: fx.Node, position: int = 2) -> bool:
    return bool(argument(node, position, "keepdim", False))


def _simple(kind: str, keepdim_position: int = 2) -> Rule:
    def value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
        source = _operand(node)
        dtype = compute_dtype(tensor_of(node).dtype)
        dims = _dims(node, len(shape_of(source)))
        return _fold(meaning, source, dims, index, _keepdim(node, keepdim_position), kind, dtype)

    return Rule("reduce", value)


def _everything(kind: str) -> Rule:
    def value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
        source = _operand(node)
        dims = range(len(shape_of(source)))
        return _fold(meaning, source, dims, (), False, kind, compute_dtype(tensor_of(node).dtype))

    return Rule("reduce", value)


def _mean(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _operand(node)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    if node.target == aten.mean.default:
        dims: tuple[int, ...] = tuple(range(len(shape)))
        keepdim = False
    else:
        dims, keepdim = _dims(node, len(shape)), _keepdim(node)
    total = _fold(meaning, source, dims, index, keepdim, "sum", dtype)
    return op("div", total, _count(shape, dims, dtype))


def _square_sum_around(
    meaning: Meaning, source: fx.Node, dims: Sequence[int], index: Index, keepdim: bool, dtype: torch.dtype
) -> Term:
    """sum((x - mean)^2): two passes over a row that stays in cache, exact where one pass would cancel."""
    shape = shape_of(source)
    mean = op("div", _fold(meaning, source, dims, index, keepdim, "sum", dtype), _count(shape, dims, dtype))
    inner, axes = _fold_index(meaning, source, dims, index, keepdim)
    centred = op("sub", cast(meaning.value(source, inner), dtype), mean)
    return _folded(dtype, "sum", axes, op("mul", centred, centred))


def _variance(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _operand(node)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    dims = _dims(node, len(shape))
    correction = argument(node, 9, "correction", 1)
    if node.target in (aten.var.dim, aten.std.dim):
        correction = 1 if argument(node, 2, "unbiased", True) else 0
        keepdim = _keepdim(node, 3)
    else:
        keepdim = _keepdim(node, 9)
    squares = _square_sum_around(meaning, source, dims, index, keepdim, dtype)
    count = op("sub", _count(shape, dims, dtype), const(1 if correction is None else correction, dtype))  # type: ignore[arg-type]
    variance = op("div", squares, op("max", count, const(0, dtype)))
    return op("sqrt", variance) if node.target in (aten.std.correction, aten.std.dim) else variance


def _arg(kind: str) -> Rule:
    def value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
        source = _operand(node)
        shape = shape_of(source)
        dims, keepdim = _dims(node, len(shape)), _keepdim(node)
        inner, axes = _fold_index(meaning, source, dims, index, keepdim)
        return _folded(torch.int64, kind, axes, meaning.value(source, inner))

    return Rule("reduce", value)


def _extreme_and_place(kind: str) -> Rule:
    """max.dim, min.dim: two results; the last index entry says which (0 the value, 1 its place)."""

    def value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
        source = _operand(node)
        dims, keepdim = _dims(node, len(shape_of(source))), _keepdim(node)
        inner, axes = _fold_index(meaning, source, dims, index[:-1], keepdim)
        body = meaning.value(source, inner)
        if index[-1] == ZERO:
            return _folded(body.dtype, kind, axes, body)
        return _folded(torch.int64, f"arg{kind}", axes, body)

    return Rule("reduce", value)


def _top_entries(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """topk: two results; the last index entry says which, the one at `dim` is the rank."""
    source = _operand(node)
    shape = shape_of(source)
    dim = normalize_dim(argument(node, 2, "dim", -1), len(shape))
    if not shape or not argument(node, 3, "largest", True) or not argument(node, 4, "sorted", True):
        raise Unsupported(f"{node.name}: top-k of a number, of the least, or in any order")
    kept = (*index[:dim], *index[dim + 1 : -1])
    inner, axes = _fold_index(meaning, source, (dim,), kept, False)
    body = meaning.value(source, inner)
    if index[-1] == ZERO:
        return Fold(body.dtype, Monoid("max"), axes, body, index[dim])
    return Fold(torch.int64, Monoid("argmax"), axes, body, index[dim])


def _softmax_parts(meaning: Meaning, node: fx.Node, index: Index) -> tuple[Term, Term, Term]:
    """(x - max) at the index, and sum(exp(x - max)) over the dimension, and the max."""
    source = _operand(node)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    dim = normalize_dim(node.args[1], len(shape))
    without = (*index[:dim], *index[dim + 1 :])
    top = _fold(meaning, source, (dim,), without, False, "max", dtype)
    inner, axes = _fold_index(meaning, source, (dim,), without, False)
    shifted = op("sub", cast(meaning.value(source, inner), dtype), top)
    total = Fold(dtype, Monoid("sum"), axes, op("exp", shifted))
    return op("sub", cast(meaning.value(source, index), dtype), top), total, top


def _softmax(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    if not shape_of(node):
        return const(1.0, compute_dtype(tensor_of(node).dtype))
    shifted, total, _ = _softmax_parts(meaning, node, index)
    return op("div", op("exp", shifted), total)


def _log_softmax(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    if not shape_of(node):
        return const(0.0, compute_dtype(tensor_of(node).dtype))
    shifted, total, _ = _softmax_parts(meaning, node, index)
    return op("sub", shifted, op("log", total))


def _logsumexp(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _operand(node)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    dims, keepdim = _dims(node, len(shape)), _keepdim(node)
    top = _fold(meaning, source, dims, index, keepdim, "max", dtype)
    finite = op("where", op("isinf", top), const(0, dtype), top)
    inner, axes = _fold_index(meaning, source, dims, index, keepdim)
    body = op("exp", op("sub", cast(meaning.value(source, inner), dtype), finite))
    return op("add", op("log", _folded(dtype, "sum", axes, body)), finite)


def _normalized_dims(node: fx.Node) -> tuple[int, ...]:
    rank, sizes = len(shape_of(_operand(node))), node.args[1]
    assert isinstance(sizes, Sequence)
    return tuple(range(rank - len(sizes), rank))


def _affine(
    meaning: Meaning, node: fx.Node, index: Index, value: Term, dims: tuple[int, ...], bias: object
) -> Term:
    """value * weight + bias, both of the normalized shape."""
    weight = argument(node, 2, "weight")
    inner = tuple(index[dim] for dim in dims)
    if isinstance(weight, fx.Node):
        value = op("mul", value, cast(meaning.value(weight, inner), value.dtype))
    if isinstance(bias, fx.Node):
        value = op("add", value, cast(meaning.value(bias, inner), value.dtype))
    return value


def _rms_norm(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _operand(node)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    dims = _normalized_dims(node)
    eps = argument(node, 3, "eps")
    epsilon = torch.finfo(tensor_of(source).dtype).eps if eps is None else eps
    outer = tuple(index[: len(index) - len(dims)])
    inner, axes = _fold_index(meaning, source, dims, outer, False)
    x = cast(meaning.value(source, inner), dtype)
    mean = op("div", Fold(dtype, Monoid("sum"), axes, op("mul", x, x)), _count(shape, dims, dtype))
    scale = op("rsqrt", op("add", mean, const(epsilon, dtype)))  # type: ignore[arg-type]
    return _affine(
        meaning, node, index, op("mul", cast(meaning.value(source, index), dtype), scale), dims, None
    )


def _layer_norm(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _operand(node)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    dims = _normalized_dims(node)
    outer = tuple(index[: len(index) - len(dims)])
    count = _count(shape, dims, dtype)
    mean = op("div", _fold(meaning, source, dims, outer, False, "sum", dtype), count)
    inner, axes = _fold_index(meaning, source, dims, outer, False)
    centred = op("sub", cast(meaning.value(source, inner), dtype), mean)
    variance = op("div", Fold(dtype, Monoid("sum"), axes, op("mul", centred, centred)), count)
    scale = op("rsqrt", op("add", variance, const(argument(node, 4, "eps", 1e-5), dtype)))  # type: ignore[arg-type]
    value = op("mul", op("sub", cast(meaning.value(source, index), dtype), mean), scale)
    return _affine(meaning, node, index, value, dims, argument(node, 3, "bias"))


def _vector_norm(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _operand(node)
    order = argument(node, 1, "ord", 2)
    if order not in (2, 2.0):
        raise Unsupported(f"{node.name}: vector norm of order {order}, only 2 has terms")
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    dims = _dims(node, len(shape), 2)
    inner, axes = _fold_index(meaning, source, dims, index, _keepdim(node, 3))
    x = cast(meaning.value(source, inner), dtype)
    return op("sqrt", _folded(dtype, "sum", axes, op("mul", x, x)))


def _any_or_all(kind: str) -> Rule:
    def value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
        source = _operand(node)
        rank = len(shape_of(source))
        whole = node.target in (aten.any.default, aten.all.default)
        dims = tuple(range(rank)) if whole else _dims(node, rank)
        inner, axes = _fold_index(meaning, source, dims, index, not whole and _keepdim(node))
        body = meaning.value(source, inner)
        truth = body if body.dtype == torch.bool else op("ne", body, const(0, body.dtype))
        return _folded(torch.bool, kind, axes, truth)

    return Rule("reduce", value)


REDUCTIONS: dict[object, Rule] = {
    aten.sum.dim_IntList: _simple("sum"), aten.sum.default: _everything("sum"), aten.amax.default: _simple("max"),
    aten.amin.default: _simple("min"), aten.max.default: _everything("max"), aten.min.default: _everything("min"),
    aten.prod.dim_int: _simple("prod"), aten.prod.default: _everything("prod"),
    aten.mean.dim: Rule("reduce", _mean), aten.mean.default: Rule("reduce", _mean),
    aten.var.correction: Rule("reduce", _variance), aten.var.dim: Rule("reduce", _variance),
    aten.std.correction: Rule("reduce", _variance), aten.std.dim: Rule("reduce", _variance),
    aten.argmax.default: _arg("argmax"), aten.argmin.default: _arg("argmin"),
    aten.topk.default: Rule("choice", _top_entries),
    aten.max.dim: _extreme_and_place("max"), aten.min.dim: _extreme_and_place("min"),
    aten.any.default: _any_or_all("any"), aten.any.dim: _any_or_all("any"), aten.any.dims: _any_or_all("any"),
    aten.all.default: _any_or_all("all"), aten.all.dim: _any_or_all("all"), aten.all.dims: _any_or_all("all"),
    aten.softmax.int: Rule("reduce", _softmax), aten._softmax.default: Rule("reduce", _softmax),
    aten.log_softmax.int: Rule("reduce", _log_softmax), aten._log_softmax.default: Rule("reduce", _log_softmax),
    aten.logsumexp.default: Rule("reduce", _logsumexp), aten.rms_norm.default: Rule("reduce", _rms_norm),
    aten.layer_norm.default: Rule("reduce", _layer_norm), aten.linalg_vector_norm.default: Rule("reduce", _vector_norm),
}  # fmt: skip
