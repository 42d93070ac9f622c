"""Bands against plain functions of the distance."""

import math
import operator
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from torchweld.graph.bands import Bands, combine

STEPS = st.lists(st.integers(-5, 5), max_size=3)


def stairs(starts: list[int]) -> Bands:
    """How many of `starts` are at or below the distance."""
    return combine(
        lambda *values: sum(values), [Bands.constant(0)] + [Bands.step(start, 0, 1) for start in starts]
    )


@given(STEPS, st.integers(-8, 8))
def test_at_is_the_function(starts: list[int], distance: int) -> None:
    assert stairs(starts).at(distance) == sum(start <= distance for start in starts)


@given(STEPS, STEPS, st.integers(-8, 8))
def test_combine_is_pointwise_and_minimal(left: list[int], right: list[int], distance: int) -> None:
    product = combine(operator.mul, [stairs(left), stairs(right)])
    assert product.at(distance) == stairs(left).at(distance) * stairs(right).at(distance)
    assert all(one != other for one, other in pairwise(product.values))


@given(STEPS, st.integers(0, 3))
def test_intervals_hold_exactly_the_wanted(starts: list[int], wanted: int) -> None:
    bands = stairs(starts)
    intervals = bands.intervals(lambda value: value == wanted)
    for distance in range(-8, 9):
        assert any(low <= distance <= high for low, high in intervals) == (bands.at(distance) == wanted)
    assert all(high + 1 < low for (_, high), (low, _) in pairwise(intervals))


def test_constant_and_types() -> None:
    assert Bands.constant(True).single is True
    assert Bands.constant(True).intervals(bool) == ((-math.inf, math.inf),)
    assert len(combine(lambda value: value, [Bands((-math.inf, 0), (True, 1))]).values) == 2
