"""How a graph is read as terms: `Meaning.value(node, index)` is one element of a node's tensor.

A rule belongs to an operation and gives the value of its output at an index by asking for its operands at other
indices.  Nodes outside the group that is read are `Load`s.  Values of 16-bit floating nodes are float32 terms: inside
a kernel nothing is rounded to 16 bits except by an explicit cast and by the store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv as TorchFloorDiv

from torchweld.graph.index import ONE, ZERO, FloorDiv, Mod, Ranges, linearize, reindex_reshape
from torchweld.graph.terms import Axis, Const, Expr, IndexValue, Load, Term, axis_symbol, cast, const, op

Index = tuple[Expr, ...]
Kind = Literal["source", "view", "pointwise", "reduce", "choice", "contract", "attention"]
"""source: made of indices only; view: only moves the index; pointwise: one element from few (gathers and
concatenations too); reduce: rows folded; choice: the greatest entries of rows; contract, attention: anchors, at most
one kind of them in a kernel part."""

DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16,
    torch.int32, torch.int64,
})  # fmt: skip
"""What values can be; others (complex, float8, quantized) run eagerly."""

RuleFunction = Callable[["Meaning", fx.Node, Index], Term]


@dataclass(frozen=True)
class Rule:
    """What an operation means, and what kind of loop it asks for."""

    kind: Kind
    value: RuleFunction


class Unsupported(Exception):
    """An operation, or a combination of arguments, that terms do not express; the message says which and why."""


@dataclass(frozen=True)
class IndirectIndex:
    """A data-dependent index: `symbol` stands for the integer `term`, 0 <= term < extent."""

    symbol: str
    term: Term
    extent: Expr


def size_expr(size: object) -> Expr:
    """An int or SymInt as an expression of our own positive integer symbols."""
    if isinstance(size, torch.SymInt):
        return _own_expression(sympy.sympify(size.node.expr))
    if isinstance(size, int):
        return sympy.Integer(size)
    raise Unsupported(f"size {size!r}: expected an integer or a symbolic integer")


@lru_cache(maxsize=4096)
def _own_expression(expr: Expr) -> Expr:
    """A size expression of torch's with torch's symbols and functions replaced by ours."""
    expr = expr.replace(TorchFloorDiv, FloorDiv)
    for symbol in expr.free_symbols:
        if not symbol.name.startswith("s"):
            raise Unsupported(f"size {expr}: {symbol} is only known after the data has been seen")
        expr = expr.subs(symbol, sympy.Symbol(symbol.name, integer=True, positive=True))
    foreign = {type(f).__name__ for f in expr.atoms(sympy.Function) if not isinstance(f, (FloorDiv, Mod))}
    if foreign:
        raise Unsupported(f"size {expr}: no rule for {', '.join(sorted(foreign))}")
    return expr


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node; Unsupported where the node is not one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unsupported(f"{node.name}: not a tensor but {type(value).__name__}")
    return value


def shape_of(node: fx.Node) -> Index:
    """The sizes of a node's tensor as expressions."""
    return tuple(size_expr(size) for size in tensor_of(node).shape)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` live inside a kernel."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An argument of a call by position or by name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def scalar_expr(value: object) -> Expr:
    """An integer argument (int, SymInt, or a node that computes a size) as an expression."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return size_expr(value)


def normalize_dim(dim: object, rank: int) -> int:
    """A dimension counted from the front."""
    if not isinstance(dim, int):
        raise Unsupported(f"dimension {dim!r}: expected an integer")
    return dim % rank if rank else 0


class Meaning:
    """Reads the nodes of `inside` as terms; every other node is a buffer named by `buffer_of`."""

    def __init__(
        self,
        rules: Callable[[fx.Node], Rule | None],
        inside: Collection[fx.Node],
        buffer_of: Callable[[fx.Node], str],
    ) -> None:
        self.rules = rules
        self.inside = inside
        self.buffer_of = buffer_of
        self.ranges = Ranges()
        self.indirects: list[IndirectIndex] = []
        self._memo: dict[tuple[fx.Node, Index], Term] = {}
        self._shared_axes: dict[tuple[object, ...], Axis] = {}
        self._indirect_memo: dict[tuple[int, Expr], Expr] = {}
        self._counter = 0

    def axis(self, hint: str, extent: Expr) -> Axis:
        """A new loop variable whose range is known from now on."""
        axis = Axis(f"{hint}{self._counter}", extent)
        self._counter += 1
        self.ranges.declare([axis])
        return axis

    def axes(self, shape: Sequence[Expr], hint: str = "i") -> tuple[Axis, ...]:
        """One new loop variable per dimension."""
        return tuple(self.axis(hint, extent) for extent in shape)

    def shared_axis(self, hint: str, extent: Expr, owner: tuple[object, ...]) -> Axis:
        """The loop variable of a sum that `owner` (what is summed, and at which index) stands for; one per owner.

        Sums of the same thing then have the same variable, so that equal ones can be seen to be equal.
        """
        key = (hint, extent, *owner)
        if key not in self._shared_axes:
            self._shared_axes[key] = self.axis(hint, extent)
        return self._shared_axes[key]

    def value(self, node: object, index: Index) -> Term:
        """The element of `node` at `index`; Unsupported where no rule gives it."""
        if not isinstance(node, fx.Node):
            raise Unsupported(f"operand {node!r}: expected a tensor")
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._compute(node, index)
        return self._memo[key]

    def _compute(self, node: fx.Node, index: Index) -> Term:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype not in DTYPES:
            raise Unsupported(f"{node.name}: values of {value.dtype}")
        if node not in self.inside:
            dtype = tensor_of(node).dtype
            return cast(Load(dtype, self.buffer_of(node), index), compute_dtype(dtype))
        rule = self.rules(node)
        if rule is None:
            raise Unsupported(f"{node.target}: no rule gives its elements")
        return rule.value(self, node, index)

    def operand(self, arg: object, out_shape: Sequence[Expr], index: Index, dtype: torch.dtype) -> Term:
        """An operand of a broadcasting operation at the output's `index`, as `dtype`; numbers become literals."""
        if isinstance(arg, (bool, int, float)):
            return const(arg, dtype)
        if isinstance(arg, torch.SymInt) or (isinstance(arg, fx.Node) and not is_tensor(arg)):
            from_size = scalar_expr(arg)
            return cast(index_value(from_size), dtype)
        if not isinstance(arg, fx.Node):
            raise Unsupported(f"operand {arg!r}: expected a tensor or a number")
        return cast(self.value(arg, broadcast_index(shape_of(arg), out_shape, index)), dtype)

    def reshape(self, node: fx.Node, index: Index, shape: Sequence[Expr]) -> Term:
        """The element of `node`, seen as `shape`, at `index`."""
        return self.value(node, reindex_reshape(index, shape, shape_of(node), self.ranges))

    def indirect(self, term: Term, extent: Expr) -> Expr:
        """An index symbol for an integer known only when the kernel runs; negative ones count from the end."""
        key = (id(term), extent)
        if key not in self._indirect_memo:
            wide = cast(term, torch.int64)
            if not isinstance(wide, Const):
                wrapped = op("add", wide, cast(index_value(extent), torch.int64))
                wide = op("where", op("lt", wide, const(0, torch.int64)), wrapped, wide)
            self._indirect_memo[key] = self.declare_indirect(wide, extent)
        return self._indirect_memo[key]

    def declare_indirect(self, term: Term, extent: Expr) -> Expr:
        """A new index symbol for `term`, 0 <= term < extent."""
        symbol = f"at{len(self.indirects)}"
        self.indirects.append(IndirectIndex(symbol, term, extent))
        self.ranges.declare([Axis(symbol, extent)])
        return axis_symbol(symbol)

    def indirect_of(self, symbol: sympy.Symbol) -> IndirectIndex | None:
        """The data-dependent index that `symbol` stands for, if it is one."""
        return next((entry for entry in self.indirects if entry.symbol == symbol.name), None)

    def offset(self, index: Index, shape: Sequence[Expr]) -> Expr:
        """The row-major position of `index`."""
        return linearize(index, shape)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def index_value(expr: Expr) -> Term:
    """An index expression as an int64 term."""
    return const(int(expr), torch.int64) if expr.is_Integer else IndexValue(torch.int64, expr)


def broadcast_index(shape: Sequence[Expr], out_shape: Sequence[Expr], index: Index) -> Index:
    """The index in an operand of `shape` for an output `index`: dimensions of size 1 stay at 0."""
    skip = len(out_shape) - len(shape)
    return tuple(
        ZERO if size == ONE and out_shape[skip + dim] != ONE else index[skip + dim]
        for dim, size in enumerate(shape)
    )
