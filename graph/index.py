"""Index arithmetic on `sympy` expressions of loop variables with known ranges.

Reshapes turn into `floordiv` and `mod`.  They vanish wherever the range of the loop variables proves it, also for
symbolic sizes: with 0 <= s < S, `(b*S + s) // S` is `b`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from torchweld.graph.terms import Axis, Expr

Integer = sympy.Integer
ZERO = Integer(0)
ONE = Integer(1)


class FloorDiv(sympy.Function):  # type: ignore[misc]  # sympy has no stubs
    """`a // b` for a >= 0, b > 0."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Any, b: Any) -> Expr | None:
        """Fold literals."""
        if a.is_Integer and b.is_Integer and b != 0:
            return Integer(int(a) // int(b))
        return a if b == 1 else None


class Mod(sympy.Function):  # type: ignore[misc]  # sympy has no stubs
    """`a % b` for a >= 0, b > 0."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Any, b: Any) -> Expr | None:
        """Fold literals."""
        if a.is_Integer and b.is_Integer and b != 0:
            return Integer(int(a) % int(b))
        return ZERO if b == 1 else None


@functools.lru_cache(maxsize=1 << 14)
def is_nonnegative(expr: Expr) -> bool:
    """Proof that `expr`, a polynomial of size symbols that are all at least 1, is at least 0.

    Every size is written as 1 + s with s >= 0; the expanded polynomial then has no negative coefficient.
    """
    expr = sympy.expand(expr)
    if expr.is_Integer:
        return bool(expr >= 0)
    if expr.has(FloorDiv, Mod):
        return False
    symbols = sorted(expr.free_symbols, key=str)
    shifted = sympy.expand(expr.subs({s: s + 1 for s in symbols}, simultaneous=True))
    return all(c.is_number and c >= 0 for c in shifted.as_coefficients_dict().values())


@dataclass
class Ranges:
    """What is known of the symbols of one kernel: `0 <= symbol < extent`; symbols without an entry are sizes >= 1."""

    extents: dict[sympy.Symbol, Expr] = field(default_factory=dict)

    def declare(self, axes: Iterable[Axis]) -> None:
        """Make the ranges of `axes` known."""
        for axis in axes:
            self.extents[axis.symbol] = axis.extent

    def upper(self, expr: Expr) -> Expr | None:
        """The greatest value of `expr` as a polynomial of sizes; None where it is not known."""
        total: Expr = ZERO
        for part in sympy.Add.make_args(sympy.expand(expr)):
            coefficient, rest = part.as_coeff_Mul()
            if coefficient < 0:
                low = self.lower(rest)
                if low is None:
                    return None
                total += coefficient * low
                continue
            bound: Expr = coefficient
            for factor in sympy.Mul.make_args(rest):
                high = self._upper_factor(factor)
                if high is None:
                    return None
                bound *= high
            total += bound
        return sympy.expand(total)

    def _upper_factor(self, factor: Expr) -> Expr | None:
        if factor in self.extents:
            return self.extents[factor] - 1
        if isinstance(factor, Mod):
            return factor.args[1] - 1
        if isinstance(factor, FloorDiv):
            inner = self.upper(factor.args[0])
            return None if inner is None else self.floordiv(inner, factor.args[1])
        if factor.is_Integer or factor.is_Symbol:
            return factor
        return None

    def lower(self, expr: Expr) -> Expr | None:
        """The least value of `expr` as a polynomial of sizes; None where it is not known."""
        total: Expr = ZERO
        for part in sympy.Add.make_args(sympy.expand(expr)):
            coefficient, rest = part.as_coeff_Mul()
            has_loop = any(s in self.extents for s in rest.free_symbols)
            if coefficient < 0:
                high = self.upper(rest)
                if high is None:
                    return None
                total += coefficient * high
            elif not has_loop and not rest.has(FloorDiv, Mod):
                total += part
        return sympy.expand(total)

    def is_less(self, a: Expr, b: Expr) -> bool:
        """Proof of a < b for all values of the loop variables."""
        high = self.upper(a)
        return high is not None and is_nonnegative(b - high - 1)

    def floordiv(self, a: Expr, b: Expr) -> Expr:
        """`a // b` simplified; a >= 0, b >= 1.  The size b = 0 has no index: nothing ever asks for the result."""
        return self.divmod(a, b)[0]

    def mod(self, a: Expr, b: Expr) -> Expr:
        """`a % b` simplified; a >= 0, b >= 1.  The size b = 0 has no index: nothing ever asks for the result."""
        return self.divmod(a, b)[1]

    def divmod(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """Both of the above: what costs is the proof that the rest is less than `b`, and they share it."""
        if b == 0:
            return a, a
        whole, rest = self._split(a, b)
        if rest == 0 or self.is_less(rest, b):
            return whole, rest
        return sympy.expand(whole) + FloorDiv(rest, b), Mod(rest, b)

    def _split(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """a = whole * b + rest, by the terms of the sum that `b` divides."""
        whole: Expr = ZERO
        rest: Expr = ZERO
        for part in sympy.Add.make_args(sympy.expand(a)):
            quotient = part / b
            if quotient.is_Integer or (
                sympy.denom(quotient) == 1 and not sympy.fraction(quotient)[1].free_symbols
            ):
                whole += quotient
            elif b.is_Integer and part.as_coeff_Mul()[0].is_Integer and abs(part.as_coeff_Mul()[0]) > b > 1:
                coefficient, tail = part.as_coeff_Mul()
                q, r = divmod(int(coefficient), int(b))
                whole += q * tail
                rest += r * tail
            else:
                rest += part
        low = self.lower(rest)
        if low is None or not is_nonnegative(low):
            return ZERO, sympy.expand(a)
        return whole, rest


def linearize(index: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """The row-major offset of `index` in a contiguous tensor of `shape`."""
    offset: Expr = ZERO
    for i, size in zip(index, shape, strict=True):
        offset = offset * size + i
    return recombine(sympy.expand(offset))


def recombine(expr: Expr) -> Expr:
    """`q * (x // q) + x % q` is `x`: what a split into heads took apart comes together again."""
    coefficients = expr.as_coefficients_dict()
    for term, factor in coefficients.items():
        if isinstance(term, Mod) and term.args[1].is_Integer:
            whole = FloorDiv(*term.args)
            if coefficients.get(whole, 0) == factor * term.args[1]:
                joined = expr - factor * term - factor * term.args[1] * whole + factor * term.args[0]
                return recombine(sympy.expand(joined))
    return expr


def delinearize(offset: Expr, shape: Sequence[Expr], ranges: Ranges) -> tuple[Expr, ...]:
    """The index in a contiguous tensor of `shape` of the row-major `offset`."""
    index: list[Expr] = []
    for size in reversed(list(shape)[1:]):
        offset, rest = ranges.divmod(offset, size)
        index.append(rest)
    return (offset, *reversed(index)) if len(shape) else ()


def reindex_reshape(
    index: Sequence[Expr], new_shape: Sequence[Expr], old_shape: Sequence[Expr], ranges: Ranges
) -> tuple[Expr, ...]:
    """The index in `old_shape` of the element that stands at `index` in its reshape to `new_shape`.

    Dimensions that both shapes share at the front or at the back keep their index untouched.
    """
    new, old = list(new_shape), list(old_shape)
    front = 0
    while front < min(len(new), len(old)) and new[front] == old[front]:
        front += 1
    back = 0
    while back < min(len(new), len(old)) - front and new[-1 - back] == old[-1 - back]:
        back += 1
    middle_new, middle_old = new[front : len(new) - back], old[front : len(old) - back]
    kept_front, kept_back = tuple(index[:front]), tuple(index[len(new) - back :])
    offset = linearize(index[front : len(new) - back], middle_new)
    if not middle_old:
        return kept_front + kept_back
    return kept_front + delinearize(offset, middle_old, ranges) + kept_back


def evaluate(expr: Expr, values: Mapping[str, int]) -> int:
    """`expr` with every symbol given by name, as an integer."""
    try:
        return _compiled(expr)(values)
    except KeyError:
        missing = sorted(str(s) for s in expr.free_symbols if str(s) not in values)
        raise KeyError(f"index expression {expr}: no value for {', '.join(missing)}") from None


@functools.lru_cache(maxsize=1 << 14)
def _compiled(expr: Expr) -> Callable[[Mapping[str, int]], int]:
    """`expr` as a function of the sizes: sympy's own substitution takes 100 us, and a step has hundreds of shapes."""
    try:
        source = _python(expr)
    except NotImplementedError:
        return functools.partial(_substitute, expr)
    function: Callable[[Mapping[str, int]], int] = eval(f"lambda sizes: {source}", {})
    return function


def _python(expr: Expr) -> str:
    """Python source of `expr` on whole numbers; NotImplementedError for an operator without one."""
    parts = [f"({_python(part)})" for part in expr.args]
    if expr.is_Integer:
        return str(expr)
    if expr.is_Symbol:
        return f"sizes[{str(expr)!r}]"
    if expr.is_Add:
        return " + ".join(parts)
    if expr.is_Mul and all(part.is_integer for part in expr.args):
        return " * ".join(parts)
    if expr.is_Pow and expr.exp.is_Integer and expr.exp >= 0:
        return f"{parts[0]} ** {parts[1]}"
    if isinstance(expr, FloorDiv | Mod):
        return ("//" if isinstance(expr, FloorDiv) else "%").join(parts)
    if isinstance(expr, sympy.Max | sympy.Min):
        return f"{'max' if isinstance(expr, sympy.Max) else 'min'}({', '.join(parts)})"
    raise NotImplementedError(type(expr).__name__)


def _substitute(expr: Expr, values: Mapping[str, int]) -> int:
    result = expr.subs({s: values[str(s)] for s in expr.free_symbols})
    if not result.is_Integer:
        result = sympy.simplify(result)
    return int(result)
