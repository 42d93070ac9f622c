"""Searched products in C++: the entries that torch finds in the logits of the same kernel, with any threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import FusionCase, numbers
from torchweld.codegen.batches import find_batch
from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import MatmulPart
from torchweld.codegen.plan import Plan
from torchweld.passes import FUSE

INF, NAN = float("inf"), float("nan")
COLUMNS, COUNT = 331, 5

SCORES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bias": lambda m, x: F.linear(x, m.w, m.b),
    "capped": lambda m, x: torch.tanh(F.linear(x, m.w) / 0.5) * 0.5,
    "cut": lambda m, x: F.linear(x, m.w)[..., :-7],
    "equal": lambda m, x: F.linear(x, m.w).round(),
    "masked": lambda m, x: F.linear(x, m.w).masked_fill(m.b > -2, -INF),
}


def stored(m: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    return tuple(score(m, x) for score, x in zip(SCORES.values(), rows, strict=True))


def chosen(m: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    """Every score has rows of its own: matmuls that read the same ones would be joined before they are searched."""
    found: list[Tensor] = []
    for score, x, again in zip(SCORES.values(), rows[::2], rows[1::2], strict=True):
        found += [*torch.topk(score(m, x), COUNT), score(m, again).argmax(-1)]
    return tuple(found)


@cache
def plans() -> tuple[Plan, Plan]:
    """All scores of [rows, k] with k = 64, stored, and what is found in them."""
    weights = {"w": numbers(COLUMNS, 64, seed=1), "b": numbers(COLUMNS, seed=2)}
    made = []
    for function, inputs in ((stored, len(SCORES)), (chosen, 2 * len(SCORES))):
        case = FusionCase(function, *(numbers(4, 64) for _ in range(inputs)), dynamic=True, **weights)
        case.fuse(*FUSE)
        made.append(case.plan().plan)
    searches = [
        part
        for launch in made[1].launches()
        for part in launch.kernel.parts
        if isinstance(part, MatmulPart) and part.choices
    ]
    assert len(searches) == 2 * len(SCORES), "not fused"
    return made[0], made[1]


@cache
def executables(precision: Precision, threads: int) -> tuple[Executable, Executable]:
    """Both plans."""
    stores, searches = (Executable(plan, threads=threads, precision=precision) for plan in plans())
    return stores, searches


def in_order(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest entries, of equals the lower place first, NaN in front: what torch's stable sort says."""
    values, places = logits.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], places[..., :count]


def assert_found(precision: Precision, threads: int, x: Tensor) -> None:
    """The search gives the bits of the stored logits, for every score."""
    plain, search = executables(precision, threads)
    found = iter(search(*[x] * (2 * len(SCORES))))
    for name, logits in zip(SCORES, plain(*[x] * len(SCORES)), strict=True):
        values, places = in_order(logits, COUNT)
        assert torch.equal(next(found).nan_to_num(nan=7.0), values.nan_to_num(nan=7.0)), name
        assert torch.equal(next(found), places), name
        assert torch.equal(next(found), places[..., 0]), name


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 70])
def test_choices_are_those_of_the_logits_of_the_same_kernel(rows: int) -> None:
    assert_found("f32", 2, numbers(rows, 64, seed=rows))


def test_choices_with_quantized_activations() -> None:
    for rows in (1, 8, 20):
        assert_found("int8", 2, numbers(rows, 64, seed=rows))


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([0.0, NAN, INF, -INF]), st.integers(0, 1 << 16))
def test_rows_of_any_numbers(rows: int, threads: int, special: float, seed: int) -> None:
    """Zeros make all products equal, infinities and NaN spread over whole rows: the lower place comes first."""
    x = numbers(rows, 64, seed=seed)
    x[seed % rows] = special
    x[rows // 2, : seed % 64] = 0.0
    assert_found("f32", threads, x)


def test_a_call_without_rows_finds_nothing() -> None:
    _, search = executables("f32", 2)
    found = search(*[torch.zeros(0, 64)] * (2 * len(SCORES)))
    assert [tuple(tensor.shape) for tensor in found[:3]] == [(0, COUNT), (0, COUNT), (0,)]
    assert_found("f32", 2, numbers(3, 64))  # the counter of the threads is as it was


def test_a_search_is_not_cut_into_pieces_of_a_batch() -> None:
    """Each thread would have a list of its own, in the same memory."""
    tables = {"w": numbers(COLUMNS, 64, seed=1)}
    scores = FusionCase(lambda m, x: F.linear(x, m.w), numbers(4, 3, 64), dynamic=True, **tables)
    best = FusionCase(lambda m, x: F.linear(x, m.w).argmax(-1), numbers(4, 3, 64), dynamic=True, **tables)
    for case in (scores, best):
        case.fuse(*FUSE)
    assert find_batch(scores.plan().plan) is not None
    assert find_batch(best.plan().plan) is None
