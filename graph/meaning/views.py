"""Views and data movement: where in the operand the output's element stands.

Views only change the index and are free in every consumer.  Concatenations, pads and gathers are pointwise: they pick
one of several elements, by a condition on the index or by an index that is only known when the kernel runs.
"""

from __future__ import annotations

import operator
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
    scalar_expr,
    shape_of,
    tensor_of,
)
from torchweld.graph.ops import dequantize as _dequantize_op  # noqa: F401  registers torchweld::dequantize
from torchweld.graph.terms import Decode, Expr, Guard, Load, Op, Term, cast, const, op

aten = torch.ops.aten


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise Unsupported(f"{node.name}: reads {source!r}, expected a tensor")
    return source


def _reshape(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    return meaning.reshape(_source(node), index, shape_of(node))


def _same_dtype_view(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    if tensor_of(node).dtype != tensor_of(_source(node)).dtype:
        raise Unsupported(f"{node.name}: a view as another dtype reads the bytes of several elements")
    return _reshape(meaning, node, index)


def permuted_dims(node: fx.Node) -> tuple[int, ...]:
    """For every output dimension, the operand's dimension."""
    rank = len(shape_of(node))
    if node.target == aten.permute.default:
        dims = node.args[1]
        assert isinstance(dims, Sequence)
        return tuple(normalize_dim(dim, rank) for dim in dims)
    order = list(range(rank))
    if node.target in (aten.t.default, aten.numpy_T.default):
        return tuple(reversed(order))
    a, b = (-2, -1) if node.target == aten.mT.default else (node.args[1], node.args[2])
    first, second = normalize_dim(a, rank), normalize_dim(b, rank)
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _permute(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    inner: list[Expr] = [ZERO] * len(index)
    for out_dim, dim in enumerate(permuted_dims(node)):
        inner[dim] = index[out_dim]
    return meaning.value(_source(node), tuple(inner))


def _expand(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _source(node)
    old, new = shape_of(source), shape_of(node)
    skip = len(new) - len(old)
    inner = tuple(
        ZERO if old[d] == ONE and new[skip + d] != ONE else index[skip + d] for d in range(len(old))
    )
    return meaning.value(source, inner)


def _slice(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _source(node)
    shape = shape_of(source)
    dim = normalize_dim(argument(node, 1, "dim", 0), len(shape))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    first = ZERO if start is None else scalar_expr(start)
    if first.is_Integer and first < 0:
        first = shape[dim] + first
        if first.is_Integer and first < 0:
            first = ZERO
    elif not first.is_Integer and not first.is_nonnegative:
        raise Unsupported(f"{node.name}: slice start {first} may be negative")
    stride = scalar_expr(step)
    return meaning.value(source, (*index[:dim], first + index[dim] * stride, *index[dim + 1 :]))


def _select(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _source(node)
    shape = shape_of(source)
    dim = normalize_dim(node.args[1], len(shape))
    position = scalar_expr(node.args[2])
    if position.is_Integer and position < 0:
        position = shape[dim] + position
    return meaning.value(source, (*index[:dim], position, *index[dim:]))


def _narrow(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    dim = normalize_dim(node.args[1], len(index))
    first = scalar_expr(node.args[2])
    return meaning.value(_source(node), (*index[:dim], index[dim] + first, *index[dim + 1 :]))


def _flip(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    shape, dims = shape_of(node), node.args[1]
    assert isinstance(dims, Sequence)
    flipped = {normalize_dim(dim, len(shape)) for dim in dims}
    return meaning.value(
        _source(node), tuple(shape[d] - 1 - i if d in flipped else i for d, i in enumerate(index))
    )


def _repeat(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source = _source(node)
    shape = shape_of(source)
    kept = index[len(index) - len(shape) :]
    return meaning.value(source, tuple(meaning.ranges.mod(i, s) for i, s in zip(kept, shape, strict=True)))


def _repeat_interleave(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    dim = argument(node, 2, "dim")
    if dim is None:
        raise Unsupported(f"{node.name}: repeat_interleave of a flattened tensor")
    d = normalize_dim(dim, len(index))
    repeats = scalar_expr(node.args[1])
    return meaning.value(
        _source(node), (*index[:d], meaning.ranges.floordiv(index[d], repeats), *index[d + 1 :])
    )


def _unfolded_pieces(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """operator.getitem: one piece of a split, chunk or unbind, or one result of a reduction with several."""
    parent, position = node.args
    assert isinstance(parent, fx.Node) and isinstance(position, int)
    rule = meaning.rules(parent)
    if rule is not None and rule.kind != "view":
        return meaning.value(parent, (*index, const_index(position)))
    source = _source(parent)
    shape = shape_of(source)
    if parent.target == aten.unbind.int:
        dim = normalize_dim(argument(parent, 1, "dim", 0), len(shape))
        return meaning.value(source, (*index[:dim], const_index(position), *index[dim:]))
    dim = normalize_dim(argument(parent, 2, "dim", 0), len(shape))
    pieces = parent.meta["val"]
    first: Expr = ZERO
    for piece in pieces[:position]:
        first += scalar_expr(piece.shape[dim])
    return meaning.value(source, (*index[:dim], index[dim] + first, *index[dim + 1 :]))


def const_index(value: int) -> Expr:
    """A literal index."""
    return ZERO + value


def _pieces_have_no_value(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    raise Unsupported(f"{node.name}: several tensors; read one of its pieces")


def _cat(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    pieces = node.args[0]
    assert isinstance(pieces, Sequence)
    tensors = [piece for piece in pieces if isinstance(piece, fx.Node) and shape_of(piece) != (ZERO,)]
    dim = normalize_dim(argument(node, 1, "dim", 0), len(index))
    starts, start = [], ZERO
    for piece in tensors:
        starts.append(start)
        start = start + shape_of(piece)[dim]
    dtype = compute_dtype(tensor_of(node).dtype)
    return _choose(meaning, tensors, starts, index, dim, dtype)


def _choose(
    meaning: Meaning,
    pieces: Sequence[fx.Node],
    starts: Sequence[Expr],
    index: Index,
    dim: int,
    dtype: torch.dtype,
) -> Term:
    """The element of the piece whose range holds index[dim]; the last piece needs no test."""
    position = index_value(index[dim])
    result: Term | None = None
    for number in reversed(range(len(pieces))):
        inner = (*index[:dim], index[dim] - starts[number], *index[dim + 1 :])
        value = cast(meaning.value(pieces[number], inner), dtype)
        if result is None:
            zero = const(0, dtype)
            inside = op("ge", position, index_value(starts[number]))
            result = value if number == 0 else Guard(dtype, inside, value, zero)
        else:
            result = Guard(dtype, op("lt", position, index_value(starts[number + 1])), value, result)
    if result is None:
        raise Unsupported("concatenation of no tensors")
    return result


def _stack(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    pieces = node.args[0]
    assert isinstance(pieces, Sequence)
    dim = normalize_dim(argument(node, 1, "dim", 0), len(index))
    dtype = compute_dtype(tensor_of(node).dtype)
    inner = (*index[:dim], *index[dim + 1 :])
    position = index_value(index[dim])
    result: Term | None = None
    for number in reversed(range(len(pieces))):
        value = cast(meaning.value(pieces[number], inner), dtype)
        is_this = op("eq", position, const(number, torch.int64))
        result = value if result is None else op("where", is_this, value, result)
    if result is None:
        raise Unsupported(f"{node.name}: stack of no tensors")
    return result


def _constant_pad(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source, pads = _source(node), node.args[1]
    assert isinstance(pads, Sequence)
    if node.target == aten.pad.default and argument(node, 2, "mode", "constant") != "constant":
        raise Unsupported(f"{node.name}: padding mode {argument(node, 2, 'mode')!r}")
    fill = argument(node, 3 if node.target == aten.pad.default else 2, "value", 0)
    shape, dtype = shape_of(source), compute_dtype(tensor_of(node).dtype)
    inner, inside = list(index), const(True, torch.bool)
    condition: Term = inside
    for number in range(len(pads) // 2):
        dim = len(shape) - 1 - number
        before, after = scalar_expr(pads[2 * number]), scalar_expr(pads[2 * number + 1])
        if before == ZERO and after == ZERO:
            continue
        inner[dim] = index[dim] - before
        position = index_value(inner[dim])
        within = op(
            "and", op("ge", position, const(0, torch.int64)), op("lt", position, index_value(shape[dim]))
        )
        condition = within if condition is inside else op("and", condition, within)
    value = meaning.value(source, tuple(inner))
    other = const(0 if fill is None else fill, dtype)  # type: ignore[arg-type]
    return value if condition is inside else Guard(dtype, condition, value, other)


def _triangle(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    diagonal = scalar_expr(argument(node, 1, "diagonal", 0))
    row, column = index_value(index[-2] + diagonal), index_value(index[-1])
    keep = op("le" if node.target == aten.tril.default else "ge", column, row)
    value = meaning.value(_source(node), index)
    return op("where", keep, value, const(0, value.dtype))


def _embedding(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
    row = meaning.indirect(meaning.value(ids, index[:-1]), shape_of(table)[0])
    return meaning.value(table, (row, index[-1]))


def _index_select(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source, ids = _source(node), node.args[2]
    shape = shape_of(source)
    if not shape:
        raise Unsupported(f"{node.name}: selects from a single number")
    dim = normalize_dim(node.args[1], len(shape))
    position = meaning.indirect(meaning.value(ids, (index[dim],)), shape[dim])
    return meaning.value(source, (*index[:dim], position, *index[dim + 1 :]))


def _gather(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    source, ids = _source(node), node.args[2]
    shape = shape_of(source)
    if not shape:
        raise Unsupported(f"{node.name}: selects from a single number")
    if len(shape) != len(index) and (len(shape), len(index)) != (1, 0):
        raise Unsupported(f"{node.name}: gathers by an empty index of another rank")
    dim = normalize_dim(node.args[1], len(shape))
    position = meaning.indirect(meaning.value(ids, index), shape[dim])
    return meaning.value(source, (*index[:dim], position, *index[dim + 1 :]))


def _index_tensor(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """x[i, j, ...] with integer tensors: adjacent ones put their broadcast shape in place of the indexed dims."""
    source, picks = _source(node), node.args[1]
    assert isinstance(picks, Sequence)
    shape = shape_of(source)
    chosen = [d for d, pick in enumerate(picks) if pick is not None]
    nodes = [picks[d] for d in chosen]
    if not chosen or any(not isinstance(n, fx.Node) or tensor_of(n).dtype == torch.bool for n in nodes):
        raise Unsupported(f"{node.name}: indexing by a boolean mask has a data-dependent size")
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    rank = max(len(shape_of(n)) for n in nodes if isinstance(n, fx.Node))
    start = chosen[0] if adjacent else 0
    block, rest = index[start : start + rank], [*index[:start], *index[start + rank :]]
    block_shape = shape_of(node)[start : start + rank]
    inner: list[Expr] = []
    for d, extent in enumerate(shape):
        if d in chosen:
            inner.append(meaning.indirect(meaning.operand(picks[d], block_shape, block, torch.int64), extent))
        else:
            inner.append(rest.pop(0))
    return meaning.value(source, tuple(inner))


def _dequantize(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """torchweld::dequantize: the bytes must stand in a buffer, possibly behind views and gathers of whole rows."""
    data, format = _source(node), node.args[1]
    assert isinstance(format, str)
    byte = meaning.value(data, (*index[:-1], ZERO))
    while isinstance(byte, Op) and byte.name == "cast":
        byte = byte.args[0]
    if not isinstance(byte, Load) or byte.index[-1] != ZERO:
        raise Unsupported(f"{node.name}: decodes bytes that are computed, expected a stored weight")
    return Decode(torch.float32, format, byte.buffer, byte.index[:-1], index[-1])


def _full(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    fill = {
        aten.zeros.default: 0,
        aten.zeros_like.default: 0,
        aten.ones.default: 1,
        aten.ones_like.default: 1,
        aten.new_zeros.default: 0,
        aten.new_ones.default: 1,
    }.get(node.target)  # type: ignore[call-overload]
    if fill is None:
        position = {aten.new_full.default: 2, aten.scalar_tensor.default: 0}.get(node.target, 1)  # type: ignore[call-overload]
        fill = node.args[position]
    dtype = compute_dtype(tensor_of(node).dtype)
    return meaning.operand(fill, shape_of(node), index, dtype)


def _arange(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    start: object = 0
    step: object = 1
    if node.target != aten.arange.default:
        start = node.args[0]
    if node.target == aten.arange.start_step and len(node.args) > 2:
        step = node.args[2]
    dtype = compute_dtype(tensor_of(node).dtype)
    if isinstance(start, float) or isinstance(step, float):
        position = cast(index_value(index[0]), dtype)
        scaled = op("mul", position, meaning.operand(step, (), (), dtype))
        return op("add", scaled, meaning.operand(start, (), (), dtype))
    return cast(index_value(scalar_expr(start) + index[0] * scalar_expr(step)), dtype)


def _view(value: object) -> Rule:
    return Rule("view", value)  # type: ignore[arg-type]


_BY_MEANING: tuple[tuple[object, tuple[object, ...]], ...] = (
    (_reshape, (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
                aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
                aten.unsqueeze.default, aten.view_as.default)),
    (_same_dtype_view, (aten.view.dtype,)),
    (_permute, (aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default)),
    (_expand, (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)),
    (_slice, (aten.slice.Tensor,)),
    (_select, (aten.select.int,)),
    (_narrow, (aten.narrow.default,)),
    (_unfolded_pieces, (operator.getitem,)),
    (_pieces_have_no_value, (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
                             aten.unbind.int)),
)  # fmt: skip
VIEWS: dict[object, Rule] = {target: _view(value) for value, targets in _BY_MEANING for target in targets}

MOVEMENT: dict[object, Rule] = {
    aten.cat.default: Rule("pointwise", _cat), aten.concat.default: Rule("pointwise", _cat),
    aten.stack.default: Rule("pointwise", _stack), aten.flip.default: Rule("pointwise", _flip),
    aten.repeat.default: Rule("pointwise", _repeat),
    aten.repeat_interleave.self_int: Rule("pointwise", _repeat_interleave),
    aten.constant_pad_nd.default: Rule("pointwise", _constant_pad), aten.pad.default: Rule("pointwise", _constant_pad),
    aten.tril.default: Rule("pointwise", _triangle), aten.triu.default: Rule("pointwise", _triangle),
    aten.embedding.default: Rule("pointwise", _embedding), aten.index_select.default: Rule("pointwise", _index_select),
    aten.gather.default: Rule("pointwise", _gather), aten.index.Tensor: Rule("pointwise", _index_tensor),
    torch.ops.torchweld.dequantize.default: Rule("pointwise", _dequantize),
}  # fmt: skip

SOURCES: dict[object, Rule] = {
    target: Rule("source", _full)
    for target in (
        aten.full.default, aten.full_like.default, aten.zeros.default, aten.zeros_like.default, aten.ones.default,
        aten.ones_like.default, aten.new_full.default, aten.new_zeros.default, aten.new_ones.default,
        aten.scalar_tensor.default,
    )
} | {
    target: Rule("source", _arange) for target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
}  # fmt: skip
