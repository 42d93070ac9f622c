"""Lookahead: the pool, the window, and the mask and positions of a pass against the paper's rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding.strategy_loop import assert_exact, greedy_text, run_text
from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.chance import Dice
from torchweld.decoding.lookahead import LookaheadProposer, NGramPool, Window
from torchweld.decoding.step_model import Budget, Outcome, Proposal
from torchweld.decoding.tree import depths, path_to, visible
from torchweld.decoding.warp import Warp

sizes = st.tuples(st.integers(1, 4), st.integers(3, 5))  # W, N
ROOM = Budget(rows=100, depth=100)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=40))
def test_the_pool_forgets_what_was_seen_longest_ago(size: int, seen: list[tuple[int, int]]) -> None:
    pool = NGramPool(size)
    for token, follower in seen:
        pool.add(token, (follower,))
    for token in range(3):
        latest = dict.fromkeys((follower,) for known, follower in reversed(seen) if known == token)
        assert list(pool.guesses(token)) == list(latest)[:size]


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4), st.integers(0, 20))
def test_the_pool_of_a_text_is_the_same_in_pieces(text: list[int], length: int, cut: int) -> None:
    whole, pieces = NGramPool(3), NGramPool(3)
    whole.add_text(text, length)
    pieces.add_text(text[:cut], length)
    pieces.add_text(text, length, min(cut, len(text)))
    for token in range(4):
        assert list(whole.guesses(token)) == list(pieces.guesses(token))
    assert len(whole) <= max(len(text) - length, 0)


def full_window(width: int, n: int, numbers: Sequence[int]) -> Window:
    """A window whose tokens are these, level by level."""
    window = Window([0], width, n, seed=0)
    counts = [width - 1, *[width] * (n - 2)]
    starts = [sum(counts[:level]) for level in range(n)]
    window.levels = [list(numbers[a:b]) for a, b in itertools.pairwise(starts)]
    assert window.is_full
    return window


def paper_mask(width: int, n: int, guesses: int) -> tuple[Tensor, list[int]]:
    """bool [rows, rows] and positions behind the pending token, rows as in the paper: pending, level 0 (columns from
    1), levels 1 .. N-2, guesses. Written down from the rule, entry by entry."""
    rows = [(0, i) for i in range(width)] + [(level, i) for level in range(1, n - 1) for i in range(width)]
    window = len(rows)
    mask = torch.zeros(window + guesses * (n - 1), window + guesses * (n - 1), dtype=torch.bool)
    for a, (level, column) in enumerate(rows):
        for b, (other, place) in enumerate(rows):
            above = other == 0 and place <= column
            mask[a, b] = above or (place == column and 1 <= other <= level)
    for guess in range(guesses):
        first = window + guess * (n - 1)
        for j in range(n - 1):
            mask[first + j, 0] = True
            mask[first + j, first : first + j + 1] = True
    positions = [level + i for level, i in rows] + [1 + j for _ in range(guesses) for j in range(n - 1)]
    return mask, positions


def propose(
    width: int, n: int, guesses: int, window: Sequence[int], pool: Sequence[int]
) -> tuple[LookaheadProposer, Proposal]:
    proposer = LookaheadProposer(window=width, ngram=n, guesses=guesses, from_text=False)
    proposer.start([7], Warp(), Dice(0))
    proposer.window = full_window(width, n, window)
    for guess in range(guesses):
        proposer.pool.add(7, tuple(pool[guess * (n - 1) : (guess + 1) * (n - 1)]))
    return proposer, proposer.propose([3, 7], ROOM)


@given(sizes, st.integers(1, 3))
def test_mask_and_positions_are_the_papers(size: tuple[int, int], guesses: int) -> None:
    width, n = size
    inside = width * (n - 1) - 1
    _, found = propose(width, n, guesses, range(100, 100 + inside), range(200, 200 + guesses * (n - 1)))
    # All tokens differ, so a token names its row; the latest guess is tried first.
    order = [*range(100, 100 + inside), *range(200, 200 + guesses * (n - 1))]
    assert sorted(found.tokens) == order
    assert found.parents is not None
    mask, positions = paper_mask(width, n, guesses)
    place = [found.tokens.index(token) for token in order]
    assert torch.equal(visible(found.parents)[place][:, place], mask[1:, 1:])
    assert [depths(found.parents)[node] for node in place] == positions[1:]
    assert bool(mask[:, 0].all()), "every row sees the pending token, which `parents` cannot leave out"
    assert len(found.tokens) == (n - 1) * (width + guesses) - 1


@given(sizes, st.integers(1, 3), st.data())
def test_rows_that_coincide_keep_their_paths(
    size: tuple[int, int], guesses: int, data: st.DataObject
) -> None:
    width, n = size
    few = st.integers(0, 1)
    window = data.draw(st.lists(few, min_size=width * (n - 1) - 1, max_size=width * (n - 1) - 1))
    pool = data.draw(st.lists(few, min_size=guesses * (n - 1), max_size=guesses * (n - 1)))
    proposer, found = propose(width, n, guesses, window, pool)
    assert found.parents is not None
    spelled = {
        tuple(found.tokens[n] for n in path_to(found.parents, node)): node
        for node in range(len(found.tokens))
    }
    assert len(spelled) == len(found.tokens)
    assert proposer.window is not None
    first, *others = proposer.window.levels
    for guess in proposer.pool.guesses(7):
        assert guess in spelled
    asked = proposer._asked
    assert asked is not None
    for column in range(width):
        path = (*first[:column], *(level[column] for level in others))
        row = asked.rows[column]
        assert row is not None and found.wanted[row] == spelled[path]


@given(sizes, st.integers(1, 3), st.integers(0, 40), st.integers(1, 6))
def test_a_proposal_stays_within_its_budget(
    size: tuple[int, int], guesses: int, rows: int, depth: int
) -> None:
    width, n = size
    proposer = LookaheadProposer(window=width, ngram=n, guesses=guesses)
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 1]
    proposer.start(text, Warp(), Dice(0))
    for _ in range(n + 1):
        found = proposer.propose(text, Budget(rows, depth))
        assert len(found.tokens) <= rows
        assert found.parents is not None or not found.tokens
        levels = depths(found.parents or ())
        assert [level <= depth for level in levels] == [
            number < found.candidate_count for number in range(len(levels))
        ]
        answer = torch.eye(8)[torch.arange(len(found.wanted)) % 8] if found.wanted else None
        proposer.observe(Outcome((), 5, 0, answer))
        text = [*text, 5]
    if rows >= proposer.row_counts[0]:
        assert proposer.window is not None and proposer.window.is_full


@given(sizes, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_a_right_window_fills_the_pool_with_right_ngrams(
    size: tuple[int, int], prompt: list[int], seed: int
) -> None:
    """A model that counts up from every token: whatever the window begins with, n-grams count up."""
    width, n = size
    window = Window(prompt, width, n, seed)
    pending = prompt[-1]
    for step in range(n + 3):
        said = [([pending, *column][-1] + 1) % 10 for column in window.columns()]
        found = window.advance(pending, said)
        assert bool(found) == (step >= n - 2)
        for _, continuation in found:
            steps = [b - a for a, b in itertools.pairwise(continuation)]
            assert all(step % 10 == 1 for step in steps)
            assert len(continuation) == n - 1
        pending = (pending + 1) % 10
        if window.is_full:
            assert [len(level) for level in window.levels] == [width - 1, *[width] * (n - 2)]


def test_what_was_said_becomes_a_guess() -> None:
    proposer = LookaheadProposer(window=2, ngram=3, guesses=2, from_text=False)
    proposer.start([4], Warp(), Dice(0))
    proposer.window = full_window(2, 3, [11, 12, 13])  # level 0: 11; level 1: 12, 13
    found = proposer.propose([4], ROOM)
    assert [found.tokens[n] for n in found.wanted] == [12, 13]
    logits = torch.zeros(2, 30)
    logits[0, 21] = logits[1, 22] = 1.0
    proposer.observe(Outcome((), 12, 0, logits))
    assert list(proposer.pool.guesses(4)) == [(12, 21)]
    assert list(proposer.pool.guesses(11)) == [(13, 22)]
    assert proposer.window.levels == [[13], [21, 22]]


def test_without_rows_nothing_moves() -> None:
    proposer = LookaheadProposer()
    proposer.start([1, 2, 3], Warp(), Dice(0))
    assert proposer.window is not None
    before = [list(level) for level in proposer.window.levels]
    assert proposer.propose([1, 2, 3], Budget(rows=1, depth=5)).tokens == ()
    proposer.observe(Outcome((), 4, 0))
    assert proposer.window.levels == before


def test_sizes_and_calls_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="window=2, ngram=2, guesses=2; expected"):
        LookaheadProposer(ngram=2)
    with pytest.raises(RuntimeError, match="before start"):
        LookaheadProposer().propose([1], ROOM)
    with pytest.raises(RuntimeError, match="prompt of one token"):
        LookaheadProposer().start([], Warp(), Dice(0))


def test_equal_seeds_begin_equally() -> None:
    prompt = list(range(50))
    assert Window(prompt, 4, 3, 1).levels == Window(prompt, 4, 3, 1).levels
    assert Window(prompt, 4, 3, 1).levels != Window(prompt, 4, 3, 2).levels


@settings(max_examples=30)
@given(sizes, st.integers(1, 3), st.integers(0, 9), st.integers(1, 24), st.booleans(), st.integers(1, 20))
def test_greedy_text_is_the_plain_one(
    size: tuple[int, int], guesses: int, seed: int, length: int, repeats: bool, rows: int
) -> None:
    forward = Markov(6, order=2, seed=seed) if repeats else WholeText(6, seed=seed)
    proposer = LookaheadProposer(window=size[0], ngram=size[1], guesses=guesses, seed=seed)
    text, _ = run_text((ToyModel(forward), proposer), [2, 5, 1], length, rows=rows)
    assert text == greedy_text(forward, [2, 5, 1], length)


@pytest.mark.parametrize(
    "warp", [Warp(do_sample=True), Warp(do_sample=True, top_k=2, repetition_penalty=1.4)]
)
@pytest.mark.parametrize("size", [(2, 3), (1, 4)])
def test_sampled_text_has_the_plain_distribution(warp: Warp, size: tuple[int, int]) -> None:
    forward = Markov(3, order=1, seed=2, spread=1.0)

    def make() -> tuple[ToyModel, LookaheadProposer]:
        return ToyModel(forward), LookaheadProposer(window=size[0], ngram=size[1], guesses=2)

    assert_exact(forward, make, [0, 2, 1, 0, 2], 4, warp)


def test_guesses_are_accepted_where_the_text_repeats() -> None:
    forward = Markov(7, order=1, seed=1)
    text, statistics = run_text((ToyModel(forward), LookaheadProposer()), [3], 64)
    assert text == greedy_text(forward, [3], 64)
    assert statistics.passes < 32, "two tokens per pass and more"


def test_the_window_alone_finds_a_circle() -> None:
    """Without n-grams of the text, what is accepted comes from Jacobi iteration."""
    forward = Markov(7, order=1, seed=1)
    proposer = LookaheadProposer(window=4, ngram=4, guesses=4, from_text=False)
    text, statistics = run_text((ToyModel(forward), proposer), [3], 64)
    assert text == greedy_text(forward, [3], 64)
    assert statistics.accepted > 16
