"""Scans against loops: whole, and continued from a cache with chains, trees and sequences of different lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops.test_cached_rows import FEATURES, chain_of, paths
from torchweld.graph.ops.scan import CachedScan, Scan

WEIGHT = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(0))


def cell(h: Tensor, count: Tensor, row: Tensor, weight: Tensor) -> list[Tensor]:
    """Carries of different dtypes and ranks, and a result."""
    h = torch.tanh(h @ weight + row)
    return [h, count + 1, h * (count + 1)]


def follow(gate: Tensor, value: Tensor, next_gate: Tensor, next_value: Tensor) -> list[Tensor]:
    """One step of a linear recurrence after another."""
    return [gate * next_gate, value * next_gate + next_value]


CELL, LINEAR = Scan(cell, 2, (0,)), Scan(follow, 2, (0, 1))
FIRST = [torch.full((1, FEATURES), 0.5), torch.tensor(2)]


def test_a_scan_is_a_loop() -> None:
    rows = torch.randn(6, 1, FEATURES)
    states, results = CELL(FIRST, [rows], [WEIGHT])
    h, count = FIRST
    for place, row in enumerate(rows):
        h, count, result = cell(h, count, row, WEIGHT)
        assert torch.equal(states[place], h) and torch.equal(results[place], result)


def test_an_associative_scan_begins_with_its_first_row() -> None:
    gates, values = torch.rand(5, 2, FEATURES), torch.randn(5, 2, FEATURES)
    products, found = LINEAR([], [gates, values], [])
    torch.testing.assert_close(products, gates.cumprod(0))
    h = values[0]
    for place in range(1, 5):
        h = gates[place] * h + values[place]
        torch.testing.assert_close(found[place], h)


def test_shapes_are_known_without_a_run() -> None:
    with FakeTensorMode():
        rows, weight = torch.empty(6, 1, FEATURES), torch.empty(FEATURES, FEATURES)
        first = [torch.empty(1, FEATURES), torch.empty((), dtype=torch.int64)]
        states, results = CELL(first, [rows], [weight])
        assert states.shape == results.shape == (6, 1, FEATURES)
        caches = [torch.empty(2, 1, 4, FEATURES), torch.empty(2, 1, 4, 1, dtype=torch.int64)]
        by_sequence, past = torch.empty(2, 3, 1, FEATURES), torch.zeros(2, dtype=torch.int64)
        found = CachedScan(CELL)(caches, [by_sequence], first, [weight], past, None)
        assert [value.shape for value in found] == [(2, 1, 3, FEATURES), (2, 1, 3, 1), (2, 3, 1, FEATURES)]
        assert found[1].dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    associative=st.booleans(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), count=st.integers(1, 6),
    spare=st.integers(1, 4), tree=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_every_row_follows_the_row_before_it(
    associative: bool, lengths: list[int], count: int, spare: int, tree: bool, seed: int
) -> None:
    """To the bit, from slots that have turned."""
    batch, draw = len(lengths), torch.Generator().manual_seed(seed)
    scan, initial, shared = (LINEAR, [], []) if associative else (CELL, FIRST, [WEIGHT])
    shapes = [(1, FEATURES), (1, FEATURES) if associative else ()]
    widths = [FEATURES, FEATURES if associative else 1]
    dtypes = [torch.float32, torch.float32 if associative else torch.int64]
    capacity = count + spare
    caches = [
        (9 * torch.randn(batch, 1, capacity, width, generator=draw)).to(dtype)
        for width, dtype in zip(widths, dtypes, strict=True)
    ]
    rows = [torch.randn(batch, count, 1, FEATURES, generator=draw) for _ in range(1 + associative)]
    path = paths(batch, count, seed) if tree else None
    *states, last = CachedScan(scan)(caches, rows, initial, shared, torch.tensor(lengths), path)
    states, results = ([*states, last], None) if associative else (states, last)
    for b, length in enumerate(lengths):
        slot = (length - 1) % capacity
        start = [cache[b, 0, slot].reshape(shape) for cache, shape in zip(caches, shapes, strict=True)]
        for t in range(count):
            carry, result = (start if length else initial), None
            for row in chain_of(path, b, t):
                line = [part[b, row] for part in rows]
                found = scan.body(*carry, *line, *shared) if carry else line
                carry, result = found[:2], found[2:]
            for state, wanted in zip(states, carry, strict=True):
                assert torch.equal(state[b, 0, t], wanted.reshape(-1))
            if results is not None and result:
                assert torch.equal(results[b, t], result[0])


def test_nothing_to_scan_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows; expected at least one"):
        CELL(FIRST, [torch.zeros(0, 1, FEATURES)], [WEIGHT])


def test_caches_that_do_not_fit_are_refused() -> None:
    rows, past = [torch.zeros(1, 2, 1, FEATURES)], torch.tensor([0])
    with pytest.raises(ValueError, match="1 caches for 2 carries"):
        CachedScan(CELL)([torch.zeros(1, 1, 4, FEATURES)], rows, FIRST, [WEIGHT], past, None)
    with pytest.raises(ValueError, match=r"the cache is \(1, 4, 3\), expected \[B, 1, C, F\]"):
        CachedScan(CELL)([torch.zeros(1, 4, 3)] * 2, rows, FIRST, [WEIGHT], past, None)
    with pytest.raises(ValueError, match=r"past is torch\.float32"):
        CachedScan(CELL)([torch.zeros(1, 1, 4, 3)] * 2, rows, FIRST, [WEIGHT], past.float(), None)
