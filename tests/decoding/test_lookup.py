"""Lookup and reference: right text whatever they guess, and guesses where the text repeats."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.strategy_loop import assert_exact, greedy_text, run_text
from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.chance import Dice
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.ngram_index import EAGER, LAX
from torchweld.decoding.reference import ReferenceProposer
from torchweld.decoding.step_model import Budget
from torchweld.decoding.warp import Warp

prompts = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@settings(max_examples=40)
@given(prompts, st.integers(1, 20), st.integers(0, 9), st.booleans(), st.integers(1, 8), st.data())
def test_greedy_text_is_the_plain_one(
    prompt: list[int], length: int, seed: int, repeats: bool, rows: int, data: st.DataObject
) -> None:
    forward = Markov(5, order=2, seed=seed) if repeats else WholeText(5, seed=seed)
    expected = greedy_text(forward, prompt, length)
    reference = data.draw(st.sampled_from([[*prompt, *expected], list(reversed(expected)), [4, 3, 2, 1]]))
    for proposer in (
        LookupProposer(abstain=EAGER),
        LookupProposer(tokens=3),
        ReferenceProposer([[0, 1], reference]),
    ):
        assert run_text((ToyModel(forward), proposer), prompt, length, rows=rows)[0] == expected


@pytest.mark.parametrize("warp", [Warp(do_sample=True), Warp(do_sample=True, repetition_penalty=1.5)])
def test_sampled_text_has_the_plain_distribution(warp: Warp) -> None:
    forward = Markov(3, order=1, seed=4, spread=1.0)
    prompt = [0, 1, 2, 0, 1, 2, 0]
    assert_exact(forward, lambda: (ToyModel(forward), LookupProposer(abstain=EAGER)), prompt, 4, warp)
    assert_exact(forward, lambda: (ToyModel(forward), ReferenceProposer([[2, 0, 0, 1]])), [1, 2], 4, warp)


def test_a_repeated_text_takes_few_passes() -> None:
    forward = Markov(7, order=1, seed=1)  # greedy text of a Markov model runs into a circle
    text, statistics = run_text((ToyModel(forward), LookupProposer()), [3], 64)
    assert text == greedy_text(forward, [3], 64)
    assert statistics.passes < 24


def test_a_right_reference_is_followed_from_the_first_match() -> None:
    forward = WholeText(50, seed=3)
    expected = greedy_text(forward, [1, 2], 48)
    text, statistics = run_text((ToyModel(forward), ReferenceProposer([[1, 2, *expected]])), [1, 2], 48)
    assert text == expected
    assert statistics.passes <= 5, "sixteen tokens per pass"


def test_guesses_stay_within_the_budget() -> None:
    proposer = LookupProposer(tokens=5, abstain=LAX)
    text = [1, 2, 3, 4] * 4
    proposer.start(text, Warp(), Dice(0))
    assert proposer.propose(text, Budget(9, 9)).tokens == (1, 2, 3, 4, 1)
    assert proposer.propose(text, Budget(9, 2)).tokens == (1, 2)
    assert proposer.propose(text, Budget(0, 9)).tokens == ()


def test_another_text_forgets_the_one_before() -> None:
    proposer = LookupProposer(abstain=EAGER)
    proposer.start([1, 2, 1], Warp(), Dice(0))
    assert proposer.propose([1, 2, 1], Budget(1, 1)).tokens == (2,)
    proposer.start([1], Warp(), Dice(0))
    assert proposer.propose([1], Budget(1, 1)).tokens == ()


def test_what_cannot_guess_is_refused() -> None:
    with pytest.raises(ValueError, match="lookup of 0 tokens"):
        LookupProposer(tokens=0)
    with pytest.raises(ValueError, match="2 references; expected one of two tokens"):
        ReferenceProposer([[], [1]])
    with pytest.raises(ValueError, match="guesses of 0 tokens"):
        ReferenceProposer([[1, 2]], tokens=0)
