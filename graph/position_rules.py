"""What every op that occurs in masks and positions does to an index or to a value: the rules of
`positions.Prover`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from torchweld.graph.bands import Bands, Number, combine
from torchweld.graph.match import MAX_INDEX, argument, aten, axis_argument, shape_of, tensor_of
from torchweld.graph.positions import (
    EXACT_FOR_POSITIONS,
    Expr,
    Extents,
    Index,
    Prover,
    Rule,
    Unprovable,
    Value,
    literal,
)


def make_prover(graph_module: fx.GraphModule, extents: Extents) -> Prover:
    """A prover for scores of the given shape that knows all ops of this file."""
    return Prover(graph_module, extents, RULES)


def _linear(function: Callable[[Any, Any], Any]) -> Rule:
    """add, sub and mul: on integer expressions as they are, on bands distance by distance."""

    def rule(prover: Prover, node: fx.Node, index: Index) -> Value:
        if node.kwargs:
            raise Unprovable(f"{node.name} has an alpha")
        left, right = (prover.operand(argument, index) for argument in node.args[:2])
        if isinstance(left, Bands) != isinstance(right, Bands):
            left, right = _as_integer(left), _as_integer(right)
        if not isinstance(left, Bands) and not isinstance(right, Bands):
            return _position(node, function(left, right))
        return prover.elementwise(function, node, index, 2)

    return rule


def _as_integer(value: Value) -> Value:
    """Bands that are one small whole number everywhere (a mask of ones as floats) as that number."""
    number = value.single if isinstance(value, Bands) else None
    if number is None or isinstance(number, bool) or not abs(number) < 2**24 or number != int(number):
        return value
    return sympy.Integer(int(number))


def _position(node: fx.Node, value: Expr) -> Value:
    """A computed position, if the dtype of `node` holds positions exactly (numbers are left to the casts)."""
    value = sympy.expand(value)
    if not value.is_Integer and tensor_of(node).dtype not in EXACT_FOR_POSITIONS:
        raise Unprovable(f"{node.name} rounds positions to {tensor_of(node).dtype}")
    return value


def _comparison(kind: str) -> Rule:
    compare: Callable[[Any, Any], bool] = getattr(operator, kind)

    def rule(prover: Prover, node: fx.Node, index: Index) -> Value:
        left, right = (prover.operand(argument, index) for argument in node.args[:2])
        if isinstance(left, Bands) or isinstance(right, Bands):
            return prover.elementwise(compare, node, index, 2)
        gap = sympy.expand(right - left)
        if gap.is_Integer:
            return Bands.constant(compare(0, int(gap)))
        if kind in ("le", "lt"):
            return prover.at_least_zero(gap if kind == "le" else gap - 1)
        if kind in ("ge", "gt"):
            return prover.at_least_zero(-gap if kind == "ge" else -gap - 1)
        equal = combine(operator.and_, [prover.at_least_zero(gap), prover.at_least_zero(-gap)])
        return equal if kind == "eq" else combine(operator.not_, [equal])

    return rule


def _pointwise(function: Callable[..., Number], arity: int) -> Rule:
    return lambda prover, node, index: prover.elementwise(function, node, index, arity)


def _divide(left: Number, right: Number) -> Number:
    return left / right if right else math.nan


def _where(prover: Prover, node: fx.Node, index: Index) -> Value:
    mask = prover.bands(prover.operand(node.args[0], index), node)
    if mask.single is not None:  # the branch that is not taken need not be provable
        return prover.operand(node.args[1] if mask.single else node.args[2], index)
    return prover.elementwise(lambda chosen, yes, no: yes if chosen else no, node, index, 3)


def _cast(prover: Prover, node: fx.Node, index: Index) -> Value:
    value = prover.operand(node.args[0], index)
    dtype = tensor_of(node).dtype
    if not isinstance(value, Bands) and not value.is_Integer:
        if dtype not in EXACT_FOR_POSITIONS:
            raise Unprovable(f"{node.name} rounds positions to {dtype}")
        return value
    if not isinstance(value, Bands):
        value = Bands.constant(int(value))
    if dtype == torch.bool:
        return combine(bool, [value])
    return combine(float if dtype.is_floating_point else int, [value])


def _filled(position: int) -> Rule:
    """full and its relatives: the fill value stands at argument `position`."""

    def rule(prover: Prover, node: fx.Node, index: Index) -> Value:
        value: Any = argument(node, position, "fill_value")
        kind = tensor_of(node).dtype
        if not isinstance(value, (bool, int, float)):
            raise Unprovable(f"{node.name} is filled with a value that is not a literal")
        return literal(
            bool(value) if kind == torch.bool else float(value) if kind.is_floating_point else int(value)
        )

    return rule


def _uniform(value: int) -> Rule:
    def rule(prover: Prover, node: fx.Node, index: Index) -> Value:
        kind = tensor_of(node).dtype
        return literal(
            bool(value) if kind == torch.bool else float(value) if kind.is_floating_point else value
        )

    return rule


def _arange(prover: Prover, node: fx.Node, index: Index) -> Value:
    if tensor_of(node).dtype not in EXACT_FOR_POSITIONS:
        raise Unprovable(f"{node.name} rounds positions to {tensor_of(node).dtype}")
    start = prover.size(node.args[0]) if len(node.args) > 1 else sympy.Integer(0)
    step = prover.size(node.args[2]) if len(node.args) > 2 else sympy.Integer(1)
    return start + step * index[0]


def _reshape(prover: Prover, node: fx.Node, index: Index) -> Value:
    """Only axes of size 1 come or go."""
    source: Any = node.args[0]
    before = [(axis, size) for axis, size in enumerate(shape_of(source)) if size != 1]
    after = [(axis, size) for axis, size in enumerate(shape_of(node)) if size != 1]
    if [size for _, size in before] != [size for _, size in after]:
        raise Unprovable(f"{node.name} merges or splits axes")
    parts = [sympy.Integer(0)] * len(shape_of(source))
    for (inside, _), (outside, _) in zip(before, after, strict=True):
        parts[inside] = index[outside]
    return prover.value(source, tuple(parts))


def _permute(prover: Prover, node: fx.Node, index: Index) -> Value:
    source: Any = node.args[0]
    axes: Any = node.args[1]
    parts = [sympy.Integer(0)] * len(index)
    for place, axis in enumerate(axes):
        parts[axis % len(axes)] = index[place]
    return prover.value(source, tuple(parts))


def _expand(prover: Prover, node: fx.Node, index: Index) -> Value:
    return prover.operand(node.args[0], index)


def _repeat(prover: Prover, node: fx.Node, index: Index) -> Value:
    """New axes in front, and axes of one entry, say the same everywhere."""
    source: Any = node.args[0]
    times: Any = node.args[1]
    shape = shape_of(source)
    rest = len(times) - len(shape)
    if any(count != 1 and size != 1 for count, size in zip(times[rest:], shape, strict=True)):
        raise Unprovable(f"{node.name} repeats an axis that has several entries")
    return prover.operand(source, index[rest:])


def _slice(prover: Prover, node: fx.Node, index: Index) -> Value:
    source: Any = node.args[0]
    axis = axis_argument(node, 1, "dim", len(index))
    start = argument(node, 2, "start")
    step = argument(node, 4, "step", 1)
    start = prover.size(0 if start is None else start)
    if start.is_negative or not prover.is_nonnegative(start):
        raise Unprovable(f"{node.name} starts at {start}")
    if argument(node, 3, "end") not in (None, MAX_INDEX) and not start.is_Integer:
        raise Unprovable(f"{node.name} may start behind the end")
    parts = list(index)
    parts[axis] = start + step * index[axis]
    return prover.value(source, tuple(parts))


def _select(prover: Prover, node: fx.Node, index: Index) -> Value:
    source: Any = node.args[0]
    axis = axis_argument(node, 1, "dim", len(index) + 1)
    place = prover.size(node.args[2])
    if not prover.is_nonnegative(place):
        raise Unprovable(f"{node.name} counts from the end")
    return prover.value(source, (*index[:axis], place, *index[axis:]))


def _gather_by_index(prover: Prover, node: fx.Node, index: Index) -> Value:
    """x[i, j, ...] with index tensors for the leading axes."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    if any(given is None for given in indices):
        raise Unprovable(f"{node.name} leaves out an axis")
    rest = len(shape_of(source)) - len(indices)
    leading = index[: len(index) - rest]
    places: list[Expr] = []
    for given in indices:
        if tensor_of(given).dtype == torch.bool:
            raise Unprovable(f"{node.name} selects by a boolean mask")
        place = prover.operand(given, leading)
        if isinstance(place, Bands) or not prover.is_nonnegative(place):
            raise Unprovable(f"{node.name} has an index that may be negative")
        places.append(place)
    return prover.value(source, (*places, *index[len(index) - rest :]))


def _gather(prover: Prover, node: fx.Node, index: Index) -> Value:
    """x[.., places[index], ..] along one axis."""
    source: Any = node.args[0]
    axis = axis_argument(node, 1, "dim", len(index))
    place = prover.operand(node.args[2], index)
    if isinstance(place, Bands) or not prover.is_nonnegative(place):
        raise Unprovable(f"{node.name} has an index that may be negative")
    return prover.value(source, (*index[:axis], place, *index[axis + 1 :]))


def _triangle(lower: bool) -> Rule:
    def rule(prover: Prover, node: fx.Node, index: Index) -> Value:
        diagonal = prover.size(argument(node, 1, "diagonal", 0))
        gap = index[-1] - index[-2] - diagonal  # kept by tril where column - row <= diagonal
        keep = prover.at_least_zero(-gap if lower else gap)
        value = prover.bands(prover.operand(node.args[0], index), node)
        return combine(lambda kept, entry: entry if kept else type(entry)(0), [keep, value])

    return rule


def _cumulative_sum(prover: Prover, node: fx.Node, index: Index) -> Value:
    """Of the same number everywhere."""
    axis = axis_argument(node, 1, "dim", len(index))
    value = prover.operand(node.args[0], index)
    number = value.single if isinstance(value, Bands) else (int(value) if value.is_Integer else None)
    if number is None or number != int(number):
        raise Unprovable(f"{node.name} sums up values that differ")
    return _position(node, int(number) * (index[axis] + 1))


def _difference(prover: Prover, node: fx.Node, index: Index) -> Value:
    """x[i] - x[i - 1] along an axis, where it is the same number for i = 0 (from `prepend`) and i > 0."""
    source: Any = node.args[0]
    axis = axis_argument(node, 2, "dim", len(index), -1)
    prepend: Any = argument(node, 3, "prepend")
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None or prepend is None:
        raise Unprovable(f"{node.name} is no first difference with one value in front")
    if shape_of(prepend)[axis] != 1:
        raise Unprovable(f"{node.name} has more than one value in front")

    def at(tensor: fx.Node, place: Expr) -> Expr:
        value = prover.operand(tensor, (*index[:axis], place, *index[axis + 1 :]))
        if isinstance(value, Bands):
            raise Unprovable(f"{node.name} is a difference of values that are no positions")
        return value

    zero = sympy.Integer(0)
    inside = sympy.expand(at(source, index[axis]) - at(source, index[axis] - 1))
    front = sympy.expand(at(source, zero) - at(prepend, zero))
    if inside != front:
        raise Unprovable(f"{node.name} differs between its first and its other entries")
    return inside


RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _filled(1),
    aten.full_like.default: _filled(1),
    aten.new_full.default: _filled(2),
    aten.scalar_tensor.default: _filled(0),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _uniform(0)),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _uniform(1)),
    aten.add.Tensor: _linear(operator.add),
    aten.sub.Tensor: _linear(operator.sub),
    aten.mul.Tensor: _linear(operator.mul),
    aten.neg.default: lambda prover, node, index: (
        prover.elementwise(operator.neg, node, index, 1)
        if isinstance(prover.operand(node.args[0], index), Bands)
        else -prover.operand(node.args[0], index)
    ),
    aten.div.Tensor: _pointwise(_divide, 2),
    **{
        getattr(getattr(aten, kind), overload): _comparison(kind)
        for kind in ("le", "lt", "ge", "gt", "eq", "ne")
        for overload in ("Tensor", "Scalar")
    },
    aten.logical_and.default: _pointwise(lambda left, right: bool(left) and bool(right), 2),
    aten.logical_or.default: _pointwise(lambda left, right: bool(left) or bool(right), 2),
    aten.logical_xor.default: _pointwise(lambda left, right: bool(left) != bool(right), 2),
    aten.logical_not.default: _pointwise(lambda value: not value, 1),
    **dict.fromkeys(
        (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where
    ),
    aten._to_copy.default: _cast,
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.clone.default: _expand,
    aten.repeat.default: _repeat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _gather_by_index,
    aten.gather.default: _gather,
    aten.tril.default: _triangle(lower=True),
    aten.triu.default: _triangle(lower=False),
    aten.cumsum.default: _cumulative_sum,
    aten.diff.default: _difference,
}
