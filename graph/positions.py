"""Symbolic evaluation of position and mask sub-graphs: what is the value at index (b, h, t, s)?

A node is a function of its index. `Prover.value` evaluates it at one symbolic index and returns either a
`sympy` expression (an integer that depends on the index and on sizes, such as an arange) or `Bands` (a
value that depends only on the distance between query and key position). Views change the index, arithmetic
combines, comparisons of two positions become bands. Whatever cannot be followed exactly raises
`Unprovable`: nothing here is inferred from examples. What each op does to an index or a value is in
`position_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from torchweld.graph.bands import Bands, Number, combine
from torchweld.graph.match import constant_tensor, dim_key, shape_of, tensor_of

Expr = Any  # sympy has no stubs
Index = tuple[Expr, ...]
Value = Any  # Bands, or a sympy expression

BATCH, HEAD, QUERY, KEY = sympy.symbols("b h t s", integer=True, nonnegative=True)
POSITION = sympy.Symbol("p", integer=True)  # of the query, counted as keys are: t + keys - queries

# Positions stay below 2**24, the first integer whose successor float32 cannot hold; bfloat16 fails at 257.
EXACT_FOR_POSITIONS = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})


class Unprovable(Exception):
    """The value is not a function of positions that this evaluator can follow: names the op that stopped
    it."""


@dataclass(frozen=True)
class Extents:
    """Sizes of the scores [batch, heads, queries, keys] as ints or sympy expressions."""

    batch: Expr
    heads: Expr
    queries: Expr
    keys: Expr


@dataclass
class Prover:
    """Evaluator for one graph and one shape of scores; remembers what it has evaluated."""

    graph_module: fx.GraphModule
    extents: Extents
    rules: Mapping[Any, Rule]
    _known: dict[tuple[fx.Node, Index], Value] = field(default_factory=dict)

    def scores_value(self, node: fx.Node) -> Bands:
        """`node`, broadcast to the scores, as bands of the distance p - s. Raises Unprovable."""
        try:
            return self.bands(self.value(node, self._aligned(node, (BATCH, HEAD, QUERY, KEY))), node)
        except (OverflowError, ValueError) as problem:  # such as int(inf) in a cast
            raise Unprovable(f"{node.name} computes a number that has no value: {problem}") from problem

    def value(self, node: fx.Node, index: Index) -> Value:
        """Value of `node` at `index` (one expression per axis). Raises Unprovable."""
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._evaluate(node, index)
        return self._known[key]

    def _evaluate(self, node: fx.Node, index: Index) -> Value:
        if node.op == "get_attr":
            return self._constant(node, index)
        rule = self.rules.get(node.target) if node.op == "call_function" else None
        if rule is None:
            name = node.target if node.op == "call_function" else f"input {node.name}"
            raise Unprovable(f"it depends on {name}")
        return rule(self, node, index)

    def operand(self, argument: Any, index: Index) -> Value:
        """Value of an argument of an elementwise op: a literal, a size, or a tensor broadcast to `index`."""
        if isinstance(argument, (bool, int, float)):
            return sympy.Integer(argument) if type(argument) is int else Bands.constant(argument)
        if not isinstance(argument, fx.Node):
            raise Unprovable(f"argument {argument!r} has no value")
        value: Any = argument.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return sympy.sympify(dim_key(value))
        return self.value(argument, self._aligned(argument, index))

    def _aligned(self, node: fx.Node, index: Index) -> Index:
        """Index of a tensor that is broadcast against `index`: axes align at the end, sizes of 1 stay at
        0."""
        shape = shape_of(node)
        tail = index[len(index) - len(shape) :] if shape else ()
        return tuple(sympy.Integer(0) if size == 1 else part for size, part in zip(shape, tail, strict=True))

    def size(self, value: Any) -> Expr:
        """A size argument (int or node) as an expression."""
        return sympy.sympify(dim_key(value.meta["val"]) if isinstance(value, fx.Node) else value)

    def _constant(self, node: fx.Node, index: Index) -> Value:
        """A stored tensor: one number, a line a + b * i, or a matrix that is constant along its diagonals."""
        tensor = constant_tensor(self.graph_module, node)
        assert tensor is not None
        if tensor.numel() == 0:
            raise Unprovable(f"constant {node.target} is empty")
        if tensor.numel() == 1:
            return literal(tensor.item())
        wide = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        flat = tensor.detach().reshape([tensor.shape[axis] for axis in wide])
        if bool((flat == flat.flatten()[0]).all()):
            return literal(flat.flatten()[0].item())
        if flat.dim() == 1 and not flat.dtype.is_floating_point and flat.dtype != torch.bool:
            first, slope = int(flat[0]), int(flat[1]) - int(flat[0])
            if torch.equal(flat, first + slope * torch.arange(len(flat), dtype=flat.dtype)):
                return first + slope * index[wide[0]]
        if flat.dim() == 2 and torch.equal(flat[1:, 1:], flat[:-1, :-1]):
            return self._diagonals(flat, index[wide[0]], index[wide[1]])
        raise Unprovable(f"constant {node.target} is neither a line nor constant along its diagonals")

    def _diagonals(self, matrix: torch.Tensor, row: Expr, column: Expr) -> Bands:
        """Bands of a matrix whose entry [i, j] depends on i - j only; the index stays inside the matrix, so
        the corner values may go on for ever."""
        shift = self.distance(row - column)
        if shift is None:
            raise Unprovable("a constant matrix is not indexed by query and key position")
        scale, offset = shift
        if scale != 1:
            raise Unprovable("a constant matrix is indexed by key position first")
        entries = [
            *reversed(matrix[0, 1:].tolist()),
            *matrix[:, 0].tolist(),
        ]  # i - j from 1 - columns to rows - 1
        first = 1 - matrix.shape[1] - offset
        starts: list[float] = [-math.inf]
        values = [entries[0]]
        for place, value in enumerate(entries):
            if value != values[-1]:
                starts.append(first + place)
                values.append(value)
        return Bands(tuple(starts), tuple(values))

    def distance(self, expression: Expr) -> tuple[int, int] | None:
        """(c, k) with expression = c * d + k for the distance d = p - s and c = 1 or -1; None if it is not
        that."""
        offset = sympy.sympify(self.extents.keys) - sympy.sympify(self.extents.queries)
        moved = sympy.expand(sympy.sympify(expression).subs(QUERY, POSITION - offset))
        for sign in (1, -1):
            rest = sympy.expand(moved - sign * (POSITION - KEY))
            if rest.is_Integer:
                return sign, int(rest)
        return None

    def is_nonnegative(self, expression: Expr) -> bool:
        """Proof of expression >= 0 for every index and every size of at least 1."""
        bounds = {
            BATCH: self.extents.batch,
            HEAD: self.extents.heads,
            QUERY: self.extents.queries,
            KEY: self.extents.keys,
        }
        least = sympy.expand(expression)
        for symbol, extent in bounds.items():
            slope = least.coeff(symbol)
            if slope.is_number and slope != 0:
                least = sympy.expand(least.subs(symbol, 0 if slope > 0 else sympy.sympify(extent) - 1))
        if least.free_symbols & bounds.keys():
            return False
        at_least_one = {size: size + 1 for size in least.free_symbols}
        shifted = sympy.expand(least.subs(at_least_one, simultaneous=True))
        return all(term.is_number and term >= 0 for term in shifted.as_coefficients_dict().values())

    def at_least_zero(self, expression: Expr) -> Bands:
        """The truth of expression >= 0 as bands. Raises Unprovable."""
        expression = sympy.expand(expression)
        if self.is_nonnegative(expression):
            return Bands.constant(True)
        if self.is_nonnegative(-expression - 1):
            return Bands.constant(False)
        line = self.distance(expression)
        if line is None:
            raise Unprovable(f"the sign of {expression} is not decided by the distance of two positions")
        sign, offset = line
        # d + k >= 0 from d = -k on; -d + k >= 0 up to d = k
        return Bands.step(-offset, False, True) if sign == 1 else Bands.step(offset + 1, True, False)

    def bands(self, value: Value, node: fx.Node) -> Bands:
        if isinstance(value, Bands):
            return value
        if value.is_Integer:
            return Bands.constant(int(value))
        raise Unprovable(f"{node.name} has the value {value}, which no distance decides")

    def elementwise(self, function: Callable[..., Number], node: fx.Node, index: Index, arity: int) -> Value:
        """`function` of bands, one per operand."""
        parts = [self.bands(self.operand(argument, index), node) for argument in node.args[:arity]]
        result = combine(function, parts)
        return combine(bool, [result]) if tensor_of(node).dtype == torch.bool else result


Rule = Callable[[Prover, fx.Node, Index], Value]


def literal(value: Number) -> Value:
    """An integer as an expression, anything else as bands."""
    return sympy.Integer(value) if type(value) is int else Bands.constant(value)
