"""Batches of sentences of different lengths: how they are cut, and that the results stay the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.graph.test_padding import IDS, MASK, Tiny, masked_mean
from torchweld.graph.capture import capture
from torchweld.graph.padding import Padding
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.optimizer.skip_padding import (
    CALL_TOKENS,
    STEP,
    WORTH,
    plan_groups,
    run_without_padding,
    sentence_lengths,
)

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=24)


@given(lengths=LENGTHS, more=st.integers(0, 100))
def test_groups_hold_every_sentence_whole_and_cost_less(lengths: list[int], more: int) -> None:
    columns = max(lengths) + more
    groups = plan_groups(lengths, columns)
    if groups is None:
        best = sum(-(-length // STEP) * STEP for length in lengths) + CALL_TOKENS * len(set(lengths))
        one = len(lengths) * min(columns, -(-max(lengths) // STEP) * STEP) + CALL_TOKENS
        assert min(best, one) > WORTH * (len(lengths) * columns + CALL_TOKENS)
        return
    assert sorted(row for rows, _ in groups for row in rows) == list(range(len(lengths)))
    assert all(lengths[row] <= width <= columns for rows, width in groups for row in rows)
    cost = sum(len(rows) * width + CALL_TOKENS for rows, width in groups)
    assert cost <= WORTH * (len(lengths) * columns + CALL_TOKENS)


def test_a_call_more_has_to_pay() -> None:
    assert plan_groups([128, 128, 120, 125], 128) is None
    assert plan_groups([128, 16], 128) is None or plan_groups([128, 16], 128) == [((0,), 128), ((1,), 16)]
    assert plan_groups([128, 16, 16, 128], 128) == [((0, 3), 128), ((1, 2), 16)]
    assert plan_groups([10, 9], 64) == [((1, 0), 16)]


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        ([[1, 1, 0], [1, 0, 0]], [2, 1]),
        ([[7, 1, 0], [1, 1, 1]], [2, 3]),
        ([[1, 1, 1], [1, 1, 1]], None),
        ([[0, 1, 1], [1, 1, 1]], None),
        ([[1, 0, 1], [1, 1, 1]], None),
        ([[1, 1, 1], [0, 0, 0]], None),
    ],
)
def test_lengths_of_masks_that_end_in_padding(rows: list[list[int]], lengths: list[int] | None) -> None:
    assert sentence_lengths(torch.tensor(rows)) == lengths


@pytest.fixture(scope="module")
def encoder() -> Compiled:
    program = capture(Tiny(masked_mean, places=28).eval(), (IDS, MASK), {}, dynamic=True, verify=False)
    return compile_program(program, options=Options(threads=1, strict=True))


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_an_encoder_gives_the_same_without_its_padding(
    encoder: Compiled, lengths: list[int], seed: int
) -> None:
    assert encoder.report.padding == Padding(mask=1, cut=(0, 1))
    assert ("padding", "is not computed: proved not to reach the results") in encoder.report.summary()
    ids = torch.randint(0, 20, (len(lengths), 28), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(28) < torch.tensor(lengths)[:, None]).long()
    (whole,) = encoder._run(ids, mask)
    (cut,) = encoder(ids, mask)
    assert isinstance(whole, Tensor) and isinstance(cut, Tensor)
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)


def test_only_the_columns_of_the_longest_sentence_are_run() -> None:
    seen: list[tuple[int, ...]] = []

    def run(ids: Tensor, mask: Tensor) -> tuple[object, ...]:
        seen.append(tuple(ids.shape))
        assert ids.shape == mask.shape and bool(mask.any(1).all())
        return ((ids * mask).sum(1, keepdim=True),)

    ids = torch.arange(6 * 128).reshape(6, 128)
    mask = (torch.arange(128) < torch.tensor([128, 5, 100, 16, 7, 12])[:, None]).long()
    (result,) = run_without_padding(run, (ids, mask), Padding(1, (0, 1)))
    assert isinstance(result, Tensor)
    assert torch.equal(result, (ids * mask).sum(1, keepdim=True))
    assert sorted(seen) == [(2, 128), (4, 16)]
    with pytest.raises(AssertionError):  # the program sees inputs that do not fit as they are
        run_without_padding(run, (ids[:, :100], mask), Padding(1, (0, 1)))
    assert seen[-1] == (6, 100)
    run_without_padding(run, (ids, torch.ones_like(mask)), Padding(1, (0, 1)))
    assert seen[-1] == (6, 128)
