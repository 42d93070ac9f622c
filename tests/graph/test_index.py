"""Index arithmetic says what integers say: reshapes, quotients, remainders and bounds, with and without symbols."""

from __future__ import annotations

from itertools import pairwise, product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy import Expr, Integer, Symbol

from torchweld.graph.index import (
    FloorDiv,
    Mod,
    Ranges,
    delinearize,
    evaluate,
    is_nonnegative,
    linearize,
    reindex_reshape,
)
from torchweld.graph.terms import Axis

S = Symbol("s0", integer=True, positive=True)
T = Symbol("s1", integer=True, positive=True)
DIMS = st.integers(1, 4)


def _axes(shape: tuple[int | Expr, ...]) -> tuple[tuple[Axis, ...], Ranges]:
    axes = tuple(Axis(f"i{n}", Integer(e) if isinstance(e, int) else e) for n, e in enumerate(shape))
    ranges = Ranges()
    ranges.declare(axes)
    return axes, ranges


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same number of elements: the same prime factors, grouped in two ways."""
    factors = draw(st.lists(st.sampled_from((1, 2, 3, 5)), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=3)))
        bounds = [0, *cuts, len(factors)]
        return tuple(prod(factors[a:b]) for a, b in pairwise(bounds))

    return grouped(), grouped()


@given(reshapes())
def test_reshape_reads_the_element_that_torch_reads(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    axes, ranges = _axes(new)
    index = reindex_reshape(
        [a.symbol for a in axes], list(map(Integer, new)), list(map(Integer, old)), ranges
    )
    numbers = torch.arange(prod(old)).reshape(old)
    wanted = numbers.reshape(new)
    for point in product(*(range(extent) for extent in new)):
        values = {f"i{n}": value for n, value in enumerate(point)}
        assert numbers[tuple(evaluate(e, values) for e in index)] == wanted[point]


def test_reshapes_of_symbolic_sizes_vanish() -> None:
    """[B*S, 6] seen as [B, S, 2, 3]: no quotient is left, since every range is known."""
    axes, ranges = _axes((S, T, 2, 3))
    b, s, h, d = (axis.symbol for axis in axes)
    index = reindex_reshape((b, s, h, d), (S, T, Integer(2), Integer(3)), (S * T, Integer(6)), ranges)
    assert index == (b * T + s, 3 * h + d)
    back = reindex_reshape(index, (S * T, Integer(6)), (S, T, Integer(2), Integer(3)), ranges)
    assert back == (b, s, h, d)


def test_what_ranges_do_not_prove_stays_a_quotient() -> None:
    axes, ranges = _axes((S,))
    (i,) = (axis.symbol for axis in axes)
    assert ranges.floordiv(i, Integer(4)) == FloorDiv(i, Integer(4))
    assert ranges.mod(i, T) == Mod(i, T)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(0, 5), st.integers(1, 12))
def test_floordiv_and_mod(n: int, m: int, factor: int, offset: int, divisor: int) -> None:
    """Over every value of two loop variables the simplified expressions have the values of Python's // and %."""
    (first, second), ranges = _axes((n, m))
    expr = first.symbol * factor + second.symbol + offset
    quotient, rest = ranges.floordiv(expr, Integer(divisor)), ranges.mod(expr, Integer(divisor))
    for i, j in product(range(n), range(m)):
        values = {first.name: i, second.name: j}
        number = i * factor + j + offset
        assert evaluate(quotient, values) == number // divisor
        assert evaluate(rest, values) == number % divisor


@given(st.integers(1, 5), st.integers(1, 5), st.integers(-4, 4), st.integers(-4, 4), st.integers(-9, 9))
def test_bounds_hold(n: int, m: int, a: int, b: int, c: int) -> None:
    (first, second), ranges = _axes((n, m))
    expr = a * first.symbol + b * second.symbol + c
    low, high = ranges.lower(expr), ranges.upper(expr)
    assert low is not None and high is not None
    values = [a * i + b * j + c for i, j in product(range(n), range(m))]
    assert (int(low), int(high)) == (min(values), max(values))


@pytest.mark.parametrize(
    ("expr", "proved"),
    [(S - 1, True), (S * T - S, True), (S - T, False), (S - 2, False), (Integer(0), True), (-S, False)],
)
def test_nonnegative_is_only_claimed_with_a_proof(expr: Expr, proved: bool) -> None:
    assert is_nonnegative(expr) is proved


def test_less_needs_the_whole_range() -> None:
    (i, j), ranges = _axes((S, 4))
    assert ranges.is_less(4 * i.symbol + j.symbol, 4 * S)
    assert not ranges.is_less(4 * i.symbol + j.symbol, 4 * S - 1)
    assert ranges.is_less(Mod(i.symbol, T), T)
    assert not ranges.is_less(Mod(i.symbol, T), S)


def test_a_size_of_nothing_has_no_index() -> None:
    """Reshapes of empty tensors divide by 0: the index is never asked for, so it may be anything but an error."""
    (i,), ranges = _axes((0,))
    assert ranges.floordiv(i.symbol, Integer(0)) == i.symbol == ranges.mod(i.symbol, Integer(0))
    index = reindex_reshape((i.symbol,), (Integer(0),), (Integer(3), Integer(0)), ranges)
    assert len(index) == 2


@given(st.lists(DIMS, min_size=1, max_size=4))
def test_linearize_is_the_contiguous_offset(shape: list[int]) -> None:
    axes, _ = _axes(tuple(shape))
    offset = linearize([axis.symbol for axis in axes], list(map(Integer, shape)))
    for number, point in enumerate(product(*map(range, shape))):
        assert evaluate(offset, {f"i{n}": value for n, value in enumerate(point)}) == number


def test_evaluate_names_what_is_missing() -> None:
    with pytest.raises(KeyError, match="no value for s1"):
        evaluate(S * T, {"s0": 2})


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_quotient_and_rest_are_one_division(sizes: list[int], data: st.DataObject) -> None:
    ranges = Ranges()
    offset = data.draw(st.integers(0, prod(sizes) - 1))
    index = delinearize(Integer(offset), [Integer(size) for size in sizes], ranges)
    assert tuple(map(int, index)) == tuple(map(int, torch.unravel_index(torch.tensor(offset), tuple(sizes))))
    a, b = Integer(offset), Integer(data.draw(st.integers(1, 9)))
    assert ranges.divmod(a, b) == (ranges.floordiv(a, b), ranges.mod(a, b)) == divmod(offset, int(b))
