"""Turns, samples and spread."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.measure import best_seconds, interleave, one_line, seconds_per_call, summarize

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=30))
def test_summary_agrees_with_numpy(samples: list[float]) -> None:
    summary = summarize(samples)
    low, high = np.percentile(samples, [25, 75])
    assert summary.median == pytest.approx(np.median(samples), abs=1e-6)
    assert summary.spread == pytest.approx((high - low) / 2, abs=1e-6)
    assert summary.mean == pytest.approx(np.mean(samples), abs=1e-6)
    assert (summary.low, summary.high, summary.count) == (min(samples), max(samples), len(samples))
    if len(samples) > 1:
        assert summary.std == pytest.approx(statistics.stdev(samples), abs=1e-6)


def test_one_wild_sample_moves_neither_median_nor_spread() -> None:
    calm = summarize([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0])
    wild = summarize([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 1e9])
    assert (wild.median, wild.spread) == (calm.median, calm.spread)
    assert wild.std > 1000 * calm.std


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_no_summary_of_nothing_and_of_no_numbers(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples"):
        summarize(samples)


@given(st.integers(1, 6), st.integers(1, 5))
def test_turns_are_taken_round_by_round(rounds: int, count: int) -> None:
    names = [f"system {i}" for i in range(count)]
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    outcomes = interleave({name: lambda name=name: run(name) for name in names}, rounds)  # type: ignore[misc]
    assert order == names * rounds  # A B A B, never A A B B
    for position, name in enumerate(names):
        expected = tuple(float(position + 1 + count * i) for i in range(rounds))
        assert outcomes[name].samples == expected
        assert outcomes[name].failure is None


def test_one_that_fails_is_out_and_the_others_go_on() -> None:
    calls = {"good": 0, "bad": 0}

    def good() -> float:
        calls["good"] += 1
        return 1.0

    def bad() -> float:
        calls["bad"] += 1
        if calls["bad"] == 2:
            raise RuntimeError("out of memory\nand a long story")
        return 2.0

    outcomes = interleave({"bad": bad, "good": good}, 4)
    assert calls == {"good": 4, "bad": 2}
    assert outcomes["good"].samples == (1.0,) * 4
    assert outcomes["bad"].samples == (2.0,)
    assert outcomes["bad"].failure == "RuntimeError: out of memory"


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        interleave({"a": lambda: 1.0}, 0)
    with pytest.raises(ValueError, match="repeats=0"):
        best_seconds(lambda: None, 0)


def test_short_calls_are_repeated_and_long_ones_are_not() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    assert seconds_per_call(call, 1e9, most_calls=7) > 0
    assert count == 7
    assert seconds_per_call(call, 0.0) > 0
    assert count == 8


def test_reasons_are_one_short_line() -> None:
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 999), limit=50)) == 50
