"""Warping against Hugging Face's own processors, and the edge cases that they leave open."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from torchweld.decoding.step_model import DecodingError
from torchweld.decoding.warp import Warp


def hugging_face(logits: Tensor, text: list[int], warp: Warp) -> Tensor:
    """Probabilities by transformers' processors, in its order, in float64."""
    ids, scores = torch.tensor([text]), logits.double()[None]
    if warp.repetition_penalty != 1.0:
        scores = hf.RepetitionPenaltyLogitsProcessor(penalty=warp.repetition_penalty)(ids, scores)
    if warp.temperature != 1.0:
        scores = hf.TemperatureLogitsWarper(warp.temperature)(ids, scores)
    if warp.top_k:
        scores = hf.TopKLogitsWarper(warp.top_k)(ids, scores)
    if warp.top_p < 1.0:
        scores = hf.TopPLogitsWarper(warp.top_p)(ids, scores)
    if warp.min_p > 0.0:
        scores = hf.MinPLogitsWarper(warp.min_p)(ids, scores)
    return scores[0].softmax(0)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 40),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
)
def test_distribution_is_that_of_hugging_face(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * 3
    text = torch.randint(vocab, (5,), generator=generator).tolist()
    warp = Warp(True, temperature, top_k, top_p, min_p, penalty)
    got = warp.distribution(logits, text)
    expected = hugging_face(logits, text, warp)
    assert got.dtype == torch.float64
    assert torch.equal(got > 0, expected > 0), "the same tokens are left"
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999999])
def test_large_vocabularies_are_cut_as_small_ones(spread: float, top_p: float) -> None:
    """Whether the likeliest 1024 of 5000 tokens decide it or not; equals on the border included (spread 0)."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread
    got = Warp(do_sample=True, top_p=top_p).distribution(logits, [])
    probabilities = logits.softmax(0)
    order = sorted(range(5000), key=lambda token: (-float(probabilities[token]), token))
    kept, total = [], 0.0
    for token in order:
        if total >= top_p:
            break
        kept.append(token)
        total += float(probabilities[token])
    wrong = set(got.nonzero()[:, 0].tolist()) ^ set(kept)
    assert len(wrong) <= (1 if spread == 0.0 else 0), (
        "where all are equal, rounding may move the border by one"
    )
    assert got.sum() == pytest.approx(1.0, abs=1e-12)


def test_of_equals_on_the_border_the_lower_stays() -> None:
    got = Warp(do_sample=True, top_p=0.4).distribution(torch.zeros(3000), [])
    assert got.nonzero()[:, 0].tolist() == list(range(1200))
    got = Warp(do_sample=True, top_p=0.55).distribution(torch.tensor([0.0, 1.0, 1.0, 1.0]), [])
    assert got.nonzero()[:, 0].tolist() == [1, 2]


def test_greedy_is_certain_and_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    for warp in (Warp(), Warp(do_sample=True, temperature=0.0)):
        assert warp.is_greedy
        assert warp.choose(logits, [0]) == 1
        assert warp.distribution(logits, [0]).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_penalty_changes_the_greedy_choice_once_per_token() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Warp(repetition_penalty=2.0).choose(logits, [1, 1, 1]) == 2
    assert Warp(repetition_penalty=2.0).choose(torch.tensor([-1.0, -3.0, -1.5]), [0, 0]) == 2


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-4])
def test_tiny_temperatures_end_at_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([-torch.inf, 2.0, 1.0])
    got = Warp(do_sample=True, temperature=temperature).distribution(logits, [])
    assert got.tolist() == [0.0, 1.0, 0.0]


def test_tokens_that_cannot_come_stay_impossible() -> None:
    logits = torch.tensor([0.0, -torch.inf, 0.0])
    for warp in (Warp(True), Warp(True, top_k=3), Warp(True, top_p=0.99), Warp(True, min_p=0.1)):
        assert warp.distribution(logits, [1]).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
    ],
)
def test_values_without_meaning_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        Warp(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(DecodingError, match="after 2 tokens"):
        Warp(do_sample=True).distribution(logits, [0, 1])


def test_nan_and_nothing_possible_are_refused() -> None:
    with pytest.raises(DecodingError, match="after 1 tokens hold NaN"):
        Warp().choose(torch.tensor([0.0, float("nan")]), [0])
    with pytest.raises(DecodingError, match="largest logit after 1 tokens is -inf"):
        Warp(do_sample=True).distribution(torch.tensor([-torch.inf, -torch.inf]), [0])


def test_top_p_keeps_no_token_beyond_the_mass() -> None:
    """Where some tokens reach the mass exactly, the next one is out, as it is for Hugging Face."""
    row = Warp(True, top_p=0.5).distribution(torch.zeros(4), [])
    assert row.tolist() == [0.5, 0.5, 0.0, 0.0]
