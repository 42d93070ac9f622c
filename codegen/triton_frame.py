"""Frames: which loop variable stands in which dimension of a tile, and index expressions within one.

A tile has rows (first dimension) and columns (last); a frame of rank 1 has columns only and its rows are scalars.
Axes that are flattened into one loop variable form a `Group`.  An offset is first written over the flat variable -
`(b*S + s)*576 + d` is `row*576 + d` - and only where that fails over the single axes, `row // S` and `row % S`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import sympy

from torchweld.codegen.triton_text import Value, index_text
from torchweld.codegen.triton_writer import Writer
from torchweld.graph.index import linearize
from torchweld.graph.terms import Axis, Expr


@dataclass(frozen=True)
class Group:
    """Axes whose row-major combination is the variable `flat`."""

    axes: tuple[Axis, ...]
    flat: Value

    def stride(self, position: int) -> Expr:
        """How far the flat variable goes when the axis at `position` goes by one."""
        return prod((axis.extent for axis in self.axes[position + 1 :]), start=sympy.Integer(1))


@dataclass(frozen=True)
class Dim:
    """One tile dimension: its place (0 rows, 1 columns), its extent as text, and when it is inside its axes."""

    place: int
    extent: int
    mask: str | None = None


@dataclass(frozen=True)
class Frame:
    """The loop variables in scope.  `values` are further symbols with a text of their own."""

    rank: int
    groups: tuple[Group, ...] = ()
    dims: Mapping[str, Dim] = field(default_factory=dict)
    values: Mapping[str, Value] = field(default_factory=dict)

    def group_of(self, symbol: Expr) -> tuple[Group, int] | None:
        """The group that holds the axis of `symbol` and its position there; inner groups hide outer ones."""
        for group in reversed(self.groups):
            for position, axis in enumerate(group.axes):
                if axis.symbol == symbol:
                    return group, position
        return None

    def with_group(self, group: Group, **dims: Dim) -> Frame:
        """This frame with one more loop variable."""
        return Frame(self.rank, (*self.groups, group), {**self.dims, **dims}, self.values)

    def with_value(self, name: str, value: Value) -> Frame:
        """This frame with one more symbol."""
        return Frame(self.rank, self.groups, self.dims, {**self.values, name: value})

    def column(self) -> str | None:
        """The dimension that runs along the columns, if there is one."""
        return next((name for name, dim in self.dims.items() if dim.place == 1), None)

    def without_column(self) -> Frame:
        """This frame with nothing along the columns, so that a reduction may take them."""
        column = self.column()
        if column is None:
            return self
        groups = tuple(g for g in self.groups if column not in g.flat.dims)
        values = {n: v for n, v in self.values.items() if column not in v.dims}
        return Frame(self.rank, groups, {n: d for n, d in self.dims.items() if n != column}, values)

    def masks(self, dims: frozenset[str]) -> list[str]:
        """The conditions under which a tile over `dims` is inside its axes."""
        return [dim.mask for name, dim in self.dims.items() if name in dims and dim.mask is not None]

    def shape(self, dims: frozenset[str]) -> str:
        """The shape of a tile over `dims` as text; "[]" for a scalar."""
        extents = [1] * self.rank
        for name in dims:
            extents[self.dims[name].place if self.rank == 2 else 0] = self.dims[name].extent
        return "[" + ", ".join(map(str, extents)) + "]" if dims or self.rank == 2 else "[]"


class IndexPrinter:
    """Index expressions as text in the current frame.  Subclasses spell data-dependent symbols."""

    def __init__(self, writer: Writer, frame: Frame) -> None:
        self.writer = writer
        self.frame = frame

    def indirect(self, symbol: Expr) -> Value | None:
        """The value of a data-dependent symbol; None if `symbol` is not one."""
        raise NotImplementedError

    def symbol(self, symbol: Expr) -> Value:
        """An axis, a further value, a data-dependent index, or a size."""
        name = str(symbol)
        if name in self.frame.values:
            return self.frame.values[name]
        found = self.frame.group_of(symbol)
        if found is not None:
            return self.axis(*found)
        return self.indirect(symbol) or Value(name)

    def axis(self, group: Group, position: int) -> Value:
        """One axis of a flattened group."""
        if len(group.axes) == 1:
            return group.flat
        value = self.prefix(group, position + 1)
        if position > 0:
            extent = self.index(group.axes[position].extent)
            value = Value(f"{value.operand} % {extent.operand}", group.flat.dims, is_atom=False)
        return self.writer.let(group.axes[position].name, value)

    def prefix(self, group: Group, count: int) -> Value:
        """The first `count` axes of a group flattened."""
        stride = self.index(group.stride(count - 1))
        if stride.text == "1":
            return group.flat
        return Value(f"{group.flat.operand} // {stride.operand}", group.flat.dims, is_atom=False)

    def index(self, expr: Expr) -> Value:
        """An index expression as text."""
        return index_text(sympy.sympify(expr), self.symbol)

    def offset(self, index: Sequence[Expr], shape: Sequence[Expr]) -> Value:
        """The row-major offset of an index, over flat variables where they fit."""
        expr = linearize(index, shape)
        flats: dict[Expr, Value] = {}
        for group in self.frame.groups:
            expr = self._flatten(expr, group, flats)
        text = index_text(expr, lambda s: flats[s] if s in flats else self.symbol(s))
        return text

    def _flatten(self, expr: Expr, group: Group, flats: dict[Expr, Value]) -> Expr:
        """`expr` over the longest flattened prefix of `group` that replaces all axes of that prefix."""
        used = {axis.symbol for axis in group.axes} & expr.free_symbols
        if len(used) < 2 or any(self.frame.group_of(s) != (group, _position(group, s)) for s in used):
            return expr
        for new_expr, count in _flattenings(expr, group):
            flat = sympy.Symbol(f"_flat{len(flats)}", integer=True, nonnegative=True)
            prefix = self.prefix(group, count)
            flats[flat] = (
                prefix if prefix.is_atom else self.writer.let("_".join(_names(group, count)), prefix)
            )
            return new_expr.subs(_PLACE, flat)
        return expr


_PLACE = sympy.Symbol("_flat", integer=True, nonnegative=True)


def _names(group: Group, count: int) -> Iterator[str]:
    return (axis.name for axis in group.axes[:count])


def _position(group: Group, symbol: Expr) -> int:
    return next(i for i, axis in enumerate(group.axes) if axis.symbol == symbol)


def _flattenings(expr: Expr, group: Group) -> Iterator[tuple[Expr, int]]:
    """The ways to write `expr` over the first 2 or more axes of `group` as one variable, the longest first."""
    for count in range(len(group.axes), 1, -1):
        axes = group.axes[:count]
        last, strides = axes[-1].symbol, [group.stride(i) / group.stride(count - 1) for i in range(count)]
        rest = sum((a.symbol * s for a, s in zip(axes[:-1], strides, strict=False)), start=sympy.Integer(0))
        new_expr = sympy.expand(expr.subs(last, _PLACE - rest))
        if not {a.symbol for a in axes} & new_expr.free_symbols:
            yield new_expr, count
