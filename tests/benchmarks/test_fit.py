"""Exponents of growing costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fit import Growth, exponent


@given(st.floats(-3, 3), st.floats(1e-6, 1e6), st.lists(st.integers(1, 10_000), min_size=2, unique=True))
def test_a_power_law_is_found_again(power: float, factor: float, sizes: list[int]) -> None:
    times = [factor * size**power for size in sizes]
    assert exponent(sizes, times) == pytest.approx(power, abs=1e-6)


def test_one_size_says_nothing() -> None:
    assert exponent([4.0], [1.0]) is None
    assert exponent([4.0, 4.0], [1.0, 2.0]) is None
    assert Growth((1.0,), (1.0,), (1.0,)).ratio is None


@pytest.mark.parametrize(
    ("sizes", "times"), [([1.0, 0.0], [1.0, 1.0]), ([1.0, 2.0], [1.0, -1.0]), ([1.0, 2.0], [1.0])]
)
def test_no_exponent_of_what_has_no_logarithm(sizes: list[float], times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"positive|one time"):
        exponent(sizes, times)


def test_growth_is_judged_by_the_roofline() -> None:
    growth = Growth((1.0, 2.0, 4.0), (1.0, 2.0, 4.0), (3.0, 6.0, 12.0))
    assert growth.exponent == pytest.approx(1.0) == growth.limit_exponent
    assert growth.ratio == pytest.approx(1.0)
    assert Growth((1.0, 4.0), (1.0, 16.0), (1.0, 4.0)).ratio == pytest.approx(4.0)


def test_a_pure_read_beside_each_size_is_the_better_limit() -> None:
    growth = Growth((1.0, 4.0), (1.0, 6.0), (1.0, 2.0), pure=(1.0, 6.0))
    assert growth.ratio == pytest.approx(1.0)
    assert growth.limit == (1.0, 6.0)
