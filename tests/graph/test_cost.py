"""The roofline in numbers, and that it grows with what it should grow with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer

from torchweld.codegen.ir import size_symbol
from torchweld.graph.cost import OVERLAP_LOSS, pricing, roofline_microseconds
from torchweld.graph.groups import NOTHING, Work
from torchweld.graph.target import Target

TARGET = Target("test", 10.0, 100.0, 400.0, 100.0, 5.0, 1 << 20, 0, 2)
amounts = st.floats(0, 1e12)


def test_memory_bound() -> None:
    """10 GB/s move 1e6 bytes in 100 us; 100 GFLOP/s do 1e6 operations in 10 us."""
    assert roofline_microseconds(1e6, 1e6, TARGET) == pytest.approx(5 + 100 + OVERLAP_LOSS * 10)


def test_arithmetic_bound() -> None:
    assert roofline_microseconds(1e5, 1e8, TARGET) == pytest.approx(5 + 1000 + OVERLAP_LOSS * 10)


def test_narrow_types_have_a_ceiling_of_their_own() -> None:
    assert roofline_microseconds(0, 4e5, TARGET, 16) == pytest.approx(5 + 1)
    assert roofline_microseconds(0, 4e5, TARGET, 32) == pytest.approx(5 + 4)
    assert roofline_microseconds(0, 4e5, TARGET) == roofline_microseconds(0, 4e5, TARGET, 32)


def test_a_kernel_that_does_nothing_costs_its_launch() -> None:
    assert roofline_microseconds(0, 0, TARGET) == TARGET.launch_us
    assert pricing(TARGET, {})(NOTHING) == TARGET.launch_us


@given(amounts, amounts, amounts)
def test_grows_with_bytes_and_with_operations(low: float, more: float, other: float) -> None:
    assert roofline_microseconds(low, other, TARGET) <= roofline_microseconds(low + more, other, TARGET)
    assert roofline_microseconds(other, low, TARGET) <= roofline_microseconds(other, low + more, TARGET)


@given(amounts, amounts)
def test_lies_between_the_greater_and_the_sum(nbytes: float, flops: float) -> None:
    memory = roofline_microseconds(nbytes, 0, TARGET) - TARGET.launch_us
    arithmetic = roofline_microseconds(0, flops, TARGET) - TARGET.launch_us
    both = roofline_microseconds(nbytes, flops, TARGET) - TARGET.launch_us
    assert max(memory, arithmetic) * (1 - 1e-9) <= both + 1e-9
    assert both <= (memory + arithmetic) * (1 + 1e-9) + 1e-9


@given(amounts, amounts, amounts, amounts)
def test_one_kernel_never_costs_more_than_two_with_the_same_work(
    a: float, b: float, c: float, d: float
) -> None:
    """Only repeated work makes a fusion lose."""
    apart = roofline_microseconds(a, b, TARGET) + roofline_microseconds(c, d, TARGET)
    assert roofline_microseconds(a + c, b + d, TARGET) <= apart - TARGET.launch_us + 1e-6 * apart


def test_prices_are_at_the_hinted_sizes() -> None:
    size = size_symbol("s0")
    work = Work(100 * size, Integer(200), 50 * size, 3)
    price = pricing(TARGET, {"s0": 1000})
    assert price(work) == roofline_microseconds(100_200, 50_000, TARGET)
    assert pricing(TARGET, {"s0": 1})(work) < price(work)


def test_prices_are_remembered_per_work() -> None:
    """Equal work priced twice is evaluated twice, one work object once: its price survives changed hints."""
    hints = {"s0": 10}
    price = pricing(TARGET, hints)
    work = Work(100 * size_symbol("s0"), Integer(0), Integer(0), 1)
    first = price(work)
    hints["s0"] = 10_000
    assert price(work) == first
    assert price(replace(work)) > first


def test_a_size_without_a_hint_is_named() -> None:
    with pytest.raises(KeyError, match="no value for s7"):
        pricing(TARGET, {"s0": 1})(Work(4 * size_symbol("s7"), Integer(0), Integer(0), 1))
