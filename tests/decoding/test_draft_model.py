"""A draft model: rolled back instead of restarted, warped as the target, and refused where its tokens are others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.chance import Dice
from torchweld.decoding.draft_model import DraftModel, shared_vocabulary
from torchweld.decoding.step_model import Budget, DecodingError
from torchweld.decoding.warp import Warp

WORDS = {"a": 0, "b": 1, "c": 2, "d": 3}


def started(model: ToyModel, prompt: list[int], warp: Warp | None = None, **values: float) -> DraftModel:
    draft = DraftModel(model, confidence=values.get("confidence", 0.0))
    draft.start(prompt, warp or Warp(), Dice(0))
    return draft


def continuation(forward: Markov | WholeText, text: list[int], count: int) -> list[int]:
    text = list(text)
    for _ in range(count):
        text.append(int(forward(torch.tensor([text]))[0, -1].argmax()))
    return text[-count:]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_guesses_are_the_drafts_own_continuation_whatever_was_accepted(data: st.DataObject) -> None:
    forward = WholeText(5, data.draw(st.integers(0, 30)))
    model = ToyModel(forward, ring=data.draw(st.sampled_from([None, 1, 4])))
    text = [1, 2, data.draw(st.integers(0, 4))]
    draft = started(model, text[:2])
    for _ in range(6):
        count = data.draw(st.integers(1, 5))
        proposal = draft.propose(text, Budget(count, count))
        expected = continuation(forward, text, count)
        assert list(proposal.tokens) == expected and proposal.probabilities is None
        accepted = data.draw(st.integers(0, count))
        text += expected[:accepted] + [data.draw(st.integers(0, 4))]
        text += data.draw(st.lists(st.integers(0, 4), max_size=2))  # passes for which it was not asked


def test_nothing_is_read_twice() -> None:
    forward = WholeText(5, 3)
    model = ToyModel(forward)
    draft = started(model, [1, 2, 3])
    text = [1, 2, 3, 4]
    guesses = draft.propose(text, Budget(4, 4)).tokens
    text += [*guesses[:2], (guesses[2] + 1) % 5]
    draft.propose(text, Budget(1, 1))
    assert model.prefills == 1
    # The pending token, three of the four guesses; then only the token that the target put in the place of the third.
    assert model.passes == [1, 1, 1, 1, 1]


def test_all_accepted_leaves_two_tokens_to_read() -> None:
    """The last guess was never fed: the off-by-one that silently spoils drafts."""
    forward = WholeText(5, 3)
    model = ToyModel(forward)
    draft = started(model, [1, 2, 3])
    text = [1, 2, 3, 4]
    text += [*draft.propose(text, Budget(3, 3)).tokens, 0]
    assert list(draft.propose(text, Budget(2, 2)).tokens) == continuation(forward, text, 2)
    assert model.passes == [1, 1, 1, 2, 1]


def test_drawn_guesses_come_with_what_they_were_drawn_from() -> None:
    forward = Markov(6, 1, seed=2)
    warp = Warp(do_sample=True, temperature=0.6, top_k=3, repetition_penalty=1.4)
    draft = started(ToyModel(forward), [1, 2], warp)
    proposal = draft.propose([1, 2, 3], Budget(4, 4))
    assert proposal.probabilities is not None and proposal.probabilities.shape == (4, 6)
    text = [1, 2, 3]
    for token, row in zip(proposal.tokens, proposal.probabilities, strict=True):
        expected = warp.distribution(forward(torch.tensor([text]))[0, -1], text)
        assert torch.equal(row, expected) and float(row[token]) > 0.0
        text.append(token)


def test_drafting_ends_behind_a_guess_it_is_not_sure_of() -> None:
    unsure = Markov(6, 1, spread=0.01)
    assert len(started(ToyModel(unsure), [1], confidence=0.9).propose([1, 2], Budget(5, 5)).tokens) == 1
    sure = Markov(6, 1, spread=200.0)
    assert len(started(ToyModel(sure), [1], confidence=0.9).propose([1, 2], Budget(5, 5)).tokens) == 5
    sample = Warp(do_sample=True)
    assert (
        len(started(ToyModel(unsure), [1], sample, confidence=0.9).propose([1, 2], Budget(5, 5)).tokens) == 1
    )


def test_a_text_longer_than_the_draft_holds_gets_no_guesses() -> None:
    draft = started(ToyModel(Markov(5), max_length=4), [1, 2])
    assert len(draft.propose([1, 2, 3], Budget(9, 9)).tokens) == 2
    assert draft.propose([1, 2, 3, 4, 0], Budget(9, 9)).tokens == ()
    assert (
        started(ToyModel(Markov(5), max_length=1), [1, 2, 3]).propose([1, 2, 3, 4], Budget(3, 3)).tokens == ()
    )


@pytest.mark.parametrize("target_size", [4, 6, 9])
def test_padded_vocabularies_guess_only_what_both_know(target_size: int) -> None:
    """The draft's logits have 6 rows, of which 4 are tokens; its favourite is padding."""
    forward = Markov(6, 1, seed=1)
    forward.table[:, 4:] = 50.0
    tokenizer = _Words(WORDS)
    draft = DraftModel.checked(ToyModel(forward), target_size, tokenizer, _Words(WORDS), confidence=0.0)
    for warp in (Warp(), Warp(do_sample=True)):
        draft.start([1], warp, Dice(0))
        proposal = draft.propose([1, 2], Budget(5, 5))
        assert all(token < 4 for token in proposal.tokens)
        if proposal.probabilities is not None:
            assert proposal.probabilities.shape == (5, target_size)
            assert float(proposal.probabilities[:, 4:].sum()) == 0.0


class _Words:
    def __init__(self, words: dict[str, int]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_vocabularies_are_compared_by_content() -> None:
    assert shared_vocabulary(WORDS, dict(WORDS), 5, 8).tolist() == [True] * 4 + [False]
    longer = WORDS | {"e": 4, "f": 5}
    assert shared_vocabulary(WORDS, longer, 8, 6).tolist() == [True] * 4 + [False] * 4
    assert shared_vocabulary(longer, WORDS, 6, 4).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ({"a": 0, "x": 1}, "token 1 is 'b' for the target and 'x' for the draft"),
        ({"b": 0, "a": 1}, "token 0 is 'a' for the target and 'b' for the draft"),
        ({"a": 9, "b": 1}, "'a' is token 0 for the target and token 9 for the draft"),
        ({"x": 7}, "shares no token"),
        ({}, "shares no token"),
    ],
)
def test_other_vocabularies_are_refused(draft: dict[str, int], message: str) -> None:
    with pytest.raises(DecodingError, match=message):
        shared_vocabulary(WORDS, draft, 4, 10)


def test_vocabularies_that_nobody_can_compare_are_refused() -> None:
    model = ToyModel(Markov(4))
    with pytest.raises(DecodingError, match="without tokenizers nobody can tell"):
        DraftModel.checked(model, 4, None, _Words(WORDS))
    with pytest.raises(DecodingError, match=r"the draft's tokenizer is a object without get_vocab\(\)"):
        DraftModel.checked(model, 4, _Words(WORDS), object())
    same = object()
    draft = DraftModel.checked(model, 4, same, same)
    draft.start([1], Warp(), Dice(0))
    assert len(draft.propose([1, 2], Budget(1, 1)).tokens) == 1
