"""Terms: the value of one element of a tensor, as an expression of its index.

A tensor operation is described by a function from an index (one `sympy` expression per dimension) to a `Term`.
Views only change the index, so they cost nothing; producers are inlined by calling their function at the index
that the consumer asks for.  Everything above (fusion legality, both code printers, the reference interpreter)
reads this one description.

A term is a DAG of immutable nodes that are shared by identity: printers give every shared node one name.

    Const, IndexValue        a literal; an index expression as a number
    Load, Decode             one element of a buffer; one element of a block-quantized row
    Op, Guard                a pointwise operation; a value that may only be computed where a condition holds
    Fold                     a reduction over axes with a monoid that is data
    Contract                 a bilinear Fold (a matmul), kept apart because printers have instructions for it
    Attend                   the online-softmax Fold whose lift holds a Contract (attention)
    Ref                      a value computed earlier in the kernel, by name (made by the scheduler only)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import sympy
import torch

Expr: TypeAlias = sympy.Expr


def axis_symbol(name: str) -> sympy.Symbol:
    """The symbol of a loop variable: a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@dataclass(frozen=True)
class Axis:
    """A loop variable that runs over `0 <= name < extent`; `extent` may hold size symbols (all at least 0)."""

    name: str
    extent: Expr

    @property
    def symbol(self) -> sympy.Symbol:
        """The variable as it stands in index expressions."""
        return axis_symbol(self.name)


@dataclass(frozen=True, eq=False)
class Term:
    """A value of `dtype`; equality is identity."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Const(Term):
    """A literal; `value` may be an infinity or NaN for floating dtypes."""

    value: float | int | bool


@dataclass(frozen=True, eq=False)
class IndexValue(Term):
    """An index expression (axes, sizes, indirect symbols) used as a number."""

    expr: Expr


@dataclass(frozen=True, eq=False)
class Load(Term):
    """Element `index` (one expression per dimension) of the contiguous buffer `buffer`."""

    buffer: str
    index: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Decode(Term):
    """Element `column` of row `row` (one expression per leading dimension) of a stored weight.

    `buffer` is uint8 of shape (*rows, row_bytes) in the block layout of `format`; the value is float32.
    """

    format: str
    buffer: str
    row: tuple[Expr, ...]
    column: Expr


@dataclass(frozen=True, eq=False)
class Op(Term):
    """A pointwise operation from `OPS` on terms."""

    name: str
    args: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Guard(Term):
    """`value` where `condition` (bool) holds, else `other`; loads inside `value` are valid only under it."""

    condition: Term
    value: Term
    other: Term


@dataclass(frozen=True)
class Monoid:
    """An associative combination with identity `init`.

    kind      sum, prod, max, min, any, all: one state of the fold's dtype;
              argmax, argmin: the state (value, index), ties go to the lowest index, NaN wins; projects the index.
    """

    kind: Literal["sum", "prod", "max", "min", "any", "all", "argmax", "argmin"]


@dataclass(frozen=True, eq=False)
class Fold(Term):
    """`body` combined over `axes` with `monoid`.

    max and min propagate NaN as torch does.  Floating sums are accumulated in `dtype` (float32 for 16-bit inputs).
    An empty sum is 0; an empty max is -inf.

    rank (max and argmax only): not the greatest, but the entry of this number in descending order, 0 <= rank < number
    of entries; NaN comes first, equals in the order of their places.
    """

    monoid: Monoid
    axes: tuple[Axis, ...]
    body: Term
    rank: Expr | None = None


@dataclass(frozen=True, eq=False)
class Contract(Term):
    """The sum over `k` of `a * b`; accumulated in float32 (float64 for float64)."""

    k: Axis
    a: Term
    b: Term


@dataclass(frozen=True, eq=False)
class Attend(Term):
    """softmax over `s` of (scale * sum_d q*k, capped, masked), times v; one element of an attention's output.

    q: term over (batch axes, t, d);  k: over (batch, s, d);  v: over (batch, s, and the output feature).
    The query position is `t`, the number of queries `t_extent`; key j is visible if `mask_kind` says so:
    "none"; "causal": j <= t + S - T; "window": causal and j > t + S - T - window.  `mask` over (…, t, s) is applied
    on top: bool (True is visible) or an additive float.  A row that sees nothing gives 0.

    Over a cache (`past` over the first batch axis is given; "causal" or "window"): the keys are numbered by position,
    and s counts them in `mask`; k and v have the key of position j in slot j mod S.  Query t stands at position
    past + t.  In a tree (`path` over the first batch axis, t and `steps`, T of them) it stands at past + depth, and
    what it sees from position past on are its ancestors: position past + i is new row path[t, i], in slot
    (past + path[t, i]) mod S; path[t, depth] is t, and -1 comes behind it.

    share: that many neighbouring heads (the last batch axis) read the same keys and values.
    sinks: over the batch axes; one more score of every row that sees anything, with the value 0.  It is not scaled,
    capped or masked.
    """

    s: Axis
    d: Axis
    q: Term
    k: Term
    v: Term
    mask: Term | None
    mask_kind: Literal["none", "causal", "window"]
    window: int
    scale: float
    soft_cap: float
    t: Expr
    t_extent: Expr
    past: Term | None = None
    path: Term | None = None
    steps: Axis | None = None
    share: int = 1
    sinks: Term | None = None


@dataclass(frozen=True, eq=False)
class Ref(Term):
    """The value that the kernel bound to `name` before."""

    name: str


UNARY: tuple[str, ...] = (
    "neg", "abs", "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid",
    "erf", "sin", "cos", "floor", "ceil", "round", "trunc", "not", "isnan", "isinf", "sign", "relu", "bitwise_not",
)  # fmt: skip
BINARY: tuple[str, ...] = (
    "add", "sub", "mul", "div", "floordiv", "mod", "pow", "max", "min", "eq", "ne", "lt", "le", "gt", "ge", "and", "or",
    "xor", "shl", "shr", "atan2",
)  # fmt: skip
OPS: Mapping[str, int] = {
    **dict.fromkeys(UNARY, 1),
    **dict.fromkeys(BINARY, 2),
    "cast": 1,  # to the node's dtype; float to integer truncates, to bool is `!= 0`, to 16 bits rounds to nearest even
    "bitcast": 1,  # the same bits as another dtype of the same width (uint16 -> float16, uint16 -> bfloat16 ...)
    "where": 3,  # both branches are always computable; see Guard for those that are not
}
"""Pointwise operations and their number of arguments.

`max`, `min` propagate NaN; `div` is true division on floats; `floordiv`, `mod` follow Python (floor);
`and`/`or`/`xor`/`not` are logical on bool and bitwise on integers (`not` on bool only); `round` is half to even;
`shl`, `shr` on integers, `shr` logical on unsigned.  Floating 16-bit arithmetic is done in float32.
"""

COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "not", "isnan", "isinf"})


def children(term: Term) -> tuple[Term, ...]:
    """The direct operands of `term`."""
    match term:
        case Op():
            return term.args
        case Guard():
            return (term.condition, term.value, term.other)
        case Fold():
            return (term.body,)
        case Contract():
            return (term.a, term.b)
        case Attend():
            optional = (term.mask, term.past, term.path, term.sinks)
            return (term.q, term.k, term.v, *(operand for operand in optional if operand is not None))
        case _:
            return ()


def walk(root: Term) -> Iterator[Term]:
    """Every distinct node below `root`, operands before users, `root` last."""
    seen: set[int] = set()
    stack: list[tuple[Term, bool]] = [(root, False)]
    while stack:
        term, done = stack.pop()
        if done:
            yield term
            continue
        if id(term) in seen:
            continue
        seen.add(id(term))
        stack.append((term, True))
        stack.extend((child, False) for child in reversed(children(term)) if id(child) not in seen)


def index_exprs(term: Term) -> tuple[Expr, ...]:
    """The index expressions that stand in this very node (not in its operands)."""
    match term:
        case IndexValue():
            return (term.expr,)
        case Load():
            return term.index
        case Decode():
            return (*term.row, term.column)
        case Fold():
            return () if term.rank is None else (term.rank,)
        case Attend():
            return (term.t,)
        case _:
            return ()


def bound_axes(term: Term) -> tuple[Axis, ...]:
    """The axes that this very node sums over."""
    match term:
        case Fold():
            return term.axes
        case Contract():
            return (term.k,)
        case Attend():
            return (term.s, term.d) if term.steps is None else (term.s, term.d, term.steps)
        case _:
            return ()


def free_symbols(
    term: Term, cache: dict[int, frozenset[sympy.Symbol]] | None = None
) -> frozenset[sympy.Symbol]:
    """Axis, size and indirect symbols that `term` depends on (those that a node inside sums over excluded)."""
    cache = {} if cache is None else cache
    for node in walk(term):
        if id(node) in cache:
            continue
        symbols: set[sympy.Symbol] = set()
        for expr in index_exprs(node):
            symbols |= expr.free_symbols
        for child in children(node):
            symbols |= cache[id(child)]
        cache[id(node)] = frozenset(symbols - {axis.symbol for axis in bound_axes(node)})
    return cache[id(term)]


def rebuild(
    term: Term, new_children: Sequence[Term], index: Callable[[Expr], Expr] = lambda expr: expr
) -> Term:
    """`term` with other operands and with `index` applied to its own index expressions."""
    match term:
        case IndexValue():
            return IndexValue(term.dtype, index(term.expr))
        case Load():
            return Load(term.dtype, term.buffer, tuple(map(index, term.index)))
        case Decode():
            return Decode(
                term.dtype, term.format, term.buffer, tuple(map(index, term.row)), index(term.column)
            )
        case Op():
            return Op(term.dtype, term.name, tuple(new_children))
        case Guard():
            return Guard(term.dtype, *new_children)
        case Fold():
            rank = None if term.rank is None else index(term.rank)
            return Fold(term.dtype, term.monoid, term.axes, new_children[0], rank)
        case Contract():
            return Contract(term.dtype, term.k, *new_children)
        case Attend():
            q, k, v, *rest = new_children
            optional = (term.mask, term.past, term.path, term.sinks)
            mask, past, path, sinks = (None if operand is None else rest.pop(0) for operand in optional)
            moved = replace(term, q=q, k=k, v=v, t=index(term.t))
            return replace(moved, mask=mask, past=past, path=path, sinks=sinks)
        case _:
            return term


def transform(
    root: Term, replace: Callable[[Term], Term | None], index: Callable[[Expr], Expr] = lambda expr: expr
) -> Term:
    """`root` with every node for which `replace` gives a term replaced (top of the DAG first), sharing kept."""
    done: dict[int, Term] = {}

    def visit(term: Term) -> Term:
        if id(term) not in done:
            new = replace(term)
            done[id(term)] = (
                new if new is not None else rebuild(term, [visit(c) for c in children(term)], index)
            )
        return done[id(term)]

    return visit(root)


class Sharing:
    """Makes structurally equal terms (with equal bound axes) one node, so that equal work is done once."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Term] = {}
        self._done: dict[int, tuple[Term, Term]] = {}

    def __call__(self, root: Term) -> Term:
        """`root` with every subterm replaced by the first one of its structure that was seen."""
        for term in walk(root):
            if id(term) not in self._done:
                operands = [self._done[id(child)][1] for child in children(term)]
                key = (type(term), term.dtype, *_own_fields(term), *map(id, operands))
                if key not in self._known:
                    same = all(new is old for new, old in zip(operands, children(term), strict=True))
                    self._known[key] = term if same else rebuild(term, operands)
                self._done[id(term)] = (term, self._known[key])
        return self._done[id(root)][1]


def _own_fields(term: Term) -> tuple[object, ...]:
    """What a node is apart from its operands; literals by their text, since 0.0 and -0.0 are equal as numbers."""
    match term:
        case Const():
            return (repr(term.value),)
        case IndexValue():
            return (term.expr,)
        case Load():
            return (term.buffer, term.index)
        case Decode():
            return (term.format, term.buffer, term.row, term.column)
        case Op() | Ref():
            return (term.name,)
        case Fold():
            return (term.monoid, term.axes, term.rank)
        case Contract():
            return (term.k,)
        case Attend():
            positions = (term.mask_kind, term.window, term.t, term.t_extent)
            given = (term.mask is None, term.past is None, term.path is None, term.sinks is None)
            return (term.s, term.d, term.scale, term.soft_cap, *positions, *given, term.steps, term.share)
        case _:
            return ()


def const(value: float | int | bool, dtype: torch.dtype) -> Const:
    """A literal of `dtype`."""
    if dtype == torch.bool:
        return Const(dtype, bool(value))
    return Const(dtype, float(value) if dtype.is_floating_point else int(value))


def op(name: str, *args: Term, dtype: torch.dtype | None = None) -> Term:
    """A pointwise operation; the dtype defaults to bool for comparisons and to the last argument's otherwise."""
    if len(args) != OPS[name]:
        raise ValueError(f"pointwise operation {name!r}: expected {OPS[name]} arguments, got {len(args)}")
    if dtype is None:
        dtype = torch.bool if name in COMPARISONS else args[-1].dtype
    return Op(dtype, name, tuple(args))


def cast(term: Term, dtype: torch.dtype) -> Term:
    """`term` as `dtype`; nothing where it has that dtype already."""
    if term.dtype == dtype:
        return term
    if isinstance(term, Const) and dtype not in (torch.bfloat16, torch.float16):
        return const(term.value, dtype)
    return Op(dtype, "cast", (term,))
