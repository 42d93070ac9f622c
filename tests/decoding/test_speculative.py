"""The speculative loop: equal to plain decoding whatever is guessed, and a cache that fits the text however it ends."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.guessing import DrawnChain, FixedChain, Guesser, RandomGuesser
from tests.decoding.test_accept import plain_texts, random_rows
from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.autoregressive import decode_plain
from torchweld.decoding.cache import CacheError
from torchweld.decoding.chance import Dice
from torchweld.decoding.draft_model import DraftModel
from torchweld.decoding.lookahead import LookaheadProposer
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.reference import ReferenceProposer
from torchweld.decoding.request import Given, Request
from torchweld.decoding.speculative import Constant, speculate
from torchweld.decoding.statistics import PassLog
from torchweld.decoding.step_model import Budget, DecodingError, Proposal, Proposer
from torchweld.decoding.warp import Warp


def plain(model: ToyModel, request: Request) -> list[Given]:
    return list(decode_plain(model, [request], chance=Dice(0), log=PassLog()))


def loop(
    model: ToyModel, request: Request, proposer: Proposer, rows: int = 6, log: PassLog | None = None
) -> Iterator[Given]:
    return speculate(model, request, proposer, policy=Constant(rows), chance=Dice(0), log=log or PassLog())


def forwards(vocab: int, seed: int) -> list[Markov | WholeText]:
    return [Markov(vocab, 1, seed), Markov(vocab, 2, seed), WholeText(vocab, seed)]


def proposers(vocab: int, seed: int) -> list[Proposer]:
    forward = forwards(vocab, seed)
    return [
        RandomGuesser(vocab, seed),
        FixedChain([seed % vocab] * 9),
        LookupProposer(tokens=5),
        ReferenceProposer([[i % vocab for i in range(20)]]),
        LookaheadProposer(),
        DraftModel(ToyModel(forward[0]), confidence=0.0),
        DraftModel(ToyModel(forward[2], max_length=12)),
        DraftModel(ToyModel(WholeText(vocab, seed), ring=2), confidence=0.0),
        DraftModel(ToyModel(Markov(vocab, 2, seed + 1)), confidence=0.3),
    ]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_greedy_text_is_the_plain_text(data: st.DataObject) -> None:
    """For every strategy, model, prompt, budget, limit, penalty and end token; logits equal bit for bit."""
    vocab, seed = data.draw(st.integers(2, 7)), data.draw(st.integers(0, 50))
    forward = data.draw(st.sampled_from(forwards(vocab, seed)))
    proposer = data.draw(st.sampled_from(proposers(vocab, seed)))
    prompt = tuple(data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=6)))
    limit = data.draw(st.sampled_from([None, len(prompt), len(prompt) + 1, len(prompt) + 9]))
    request = Request(
        prompt,
        max_new_tokens=data.draw(st.integers(1, 20)),
        eos=frozenset(data.draw(st.lists(st.integers(0, vocab - 1), max_size=1))),
        warp=Warp(repetition_penalty=data.draw(st.sampled_from([1.0, 1.6]))),
        logprobs=True,
    )
    expected = plain(ToyModel(forward, limit), request)
    model = ToyModel(forward, limit)
    got = list(loop(model, request, proposer, rows=data.draw(st.integers(1, 16))))
    assert got == expected
    assert model.texts == [[*prompt, *(g.token for g in got[:-1])]]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ending_early_leaves_the_cache_at_what_was_given_out(data: st.DataObject) -> None:
    vocab, seed = 5, data.draw(st.integers(0, 30))
    forward = data.draw(st.sampled_from(forwards(vocab, seed)))
    proposer = data.draw(st.sampled_from(proposers(vocab, seed)))
    count = data.draw(st.integers(1, 12))
    model = ToyModel(forward)
    pieces = loop(model, Request((1, 2), 20), proposer)
    tokens = [given.token for given in islice(pieces, count)]
    pieces.close()  # type: ignore[attr-defined]
    assert model.texts == [[1, 2, *tokens[:-1]]]
    assert tokens == [given.token for given in plain(ToyModel(forward), Request((1, 2), count))]


def test_a_perfect_draft_takes_few_passes() -> None:
    forward = WholeText(7, 3)
    model, log = ToyModel(forward), PassLog()
    tokens = list(loop(model, Request((1,), 25), DraftModel(ToyModel(forward), confidence=0.0), 5, log))
    assert len(tokens) == 25
    assert model.passes == [6] * 4, (
        "1 token from the prompt, then 4 passes of 5 guesses and the token behind them"
    )
    statistics = log.freeze(len(tokens))
    assert (statistics.drafted, statistics.accepted, statistics.passes) == (20, 20, 4)
    assert statistics.accepted_lengths == (0, 0, 0, 0, 0, 4)
    assert statistics.tokens_per_pass == 6.0


def test_guesses_beyond_what_remains_are_not_made() -> None:
    forward = WholeText(7, 3)
    model = ToyModel(forward)
    list(loop(model, Request((1,), 4), DraftModel(ToyModel(forward), confidence=0.0), 16))
    assert model.passes == [3], (
        "of 4 tokens 1 came from the prompt; 2 guesses and the token behind them are the rest"
    )
    model = ToyModel(forward, max_length=4)
    given = list(loop(model, Request((1,), 40), DraftModel(ToyModel(forward), confidence=0.0), 16))
    assert [g.finish for g in given] == [None, None, None, "limit"]
    assert model.passes == [3]


def test_no_pass_has_more_rows_than_leave_the_bits() -> None:
    class Rounded(ToyModel):
        exact_rows = 4

    forward = WholeText(7, 3)
    model = Rounded(forward)
    list(loop(model, Request((1,), 40), DraftModel(ToyModel(forward), confidence=0.0), 16))
    assert max(model.passes) == 4


def test_an_end_token_inside_a_draft_ends_the_text() -> None:
    forward = WholeText(7, 3)
    whole = [g.token for g in plain(ToyModel(forward), Request((1,), 12))]
    stop = whole[3]
    assert stop not in whole[:3]
    model = ToyModel(forward)
    request = Request((1,), 12, eos=frozenset([stop]))
    given = list(loop(model, request, DraftModel(ToyModel(forward), confidence=0.0), 8))
    assert [g.token for g in given] == whole[:4]
    assert given[-1].finish == "eos"
    assert model.texts == [[1, *whole[:3]]]


class Failing(Guesser):
    name = "shaky"

    def __init__(self, error: BaseException, calls: int) -> None:
        super().__init__()
        self.error, self.calls = error, calls

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return Proposal((0, 1)[: budget.chain])


def test_a_proposer_that_raises_is_named_and_the_cache_fits_the_text() -> None:
    model = ToyModel(WholeText(5, 1))
    tokens = []
    with pytest.raises(
        DecodingError, match=r"proposer 'shaky' failed after \d+ tokens: ZeroDivisionError: oh"
    ):
        for given in loop(model, Request((1, 2), 20), Failing(ZeroDivisionError("oh"), 3)):
            tokens.append(given.token)
    assert tokens == [g.token for g in plain(ToyModel(WholeText(5, 1)), Request((1, 2), len(tokens)))]
    assert model.texts == [[1, 2, *tokens[:-1]]]


@pytest.mark.parametrize("where", ["propose", "step", "judge"])
def test_an_interrupt_anywhere_leaves_the_cache_at_the_text(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(ToyModel):
        def step(self, *args: object, **kwargs: object) -> torch.Tensor:
            result = super().step(*args, **kwargs)  # type: ignore[arg-type]
            if where == "step" and len(self.passes) == 4:
                raise KeyboardInterrupt  # after the cache has grown
            return result

    model = Interrupted(WholeText(5, 1))
    if where == "judge":
        from torchweld.decoding import speculative

        def judge(*args: object) -> object:
            if len(model.passes) == 4:
                raise KeyboardInterrupt
            return original(*args)  # type: ignore[arg-type]

        original = speculative.judge  # type: ignore[attr-defined]
        monkeypatch.setattr(speculative, "judge", judge)
    proposer = Failing(KeyboardInterrupt(), 3) if where == "propose" else RandomGuesser(5, 1)
    tokens = []
    with pytest.raises(KeyboardInterrupt):
        for given in loop(model, Request((1, 2), 40), proposer):
            tokens.append(given.token)
    assert len(tokens) >= 3
    assert model.texts == [[1, 2, *tokens[:-1]]]


def test_a_proposal_beyond_the_budget_is_refused() -> None:
    class Greedy(Guesser):
        def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
            return Proposal((0,) * (budget.rows + 1))

    with pytest.raises(DecodingError, match="'guesser' gave 4 guesses; expected at most 3"):
        list(loop(ToyModel(Markov(3)), Request((1,), 20), Greedy(), rows=3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 3), "the prompt has no tokens"),
        (Request((1, 9), 3), "token 1 of the prompt is 9; expected 0 to 4"),
        (Request((1, 5), 3), "token 1 of the prompt is 5; expected 0 to 4"),
        (Request((1,) * 9, 3), "the prompt has 9 tokens, more than the limit of 8"),
        (Request((1,), 0), "max_new_tokens is 0"),
    ],
)
def test_bad_requests_leave_the_cache_as_it_was(request_: Request, message: str) -> None:
    model = ToyModel(Markov(5), max_length=8)
    model.prefill([[1, 2, 3]])
    with pytest.raises(DecodingError, match=message):
        list(loop(model, request_, FixedChain([1])))
    with pytest.raises(DecodingError, match=message):
        plain(model, request_)
    assert model.texts == [[1, 2, 3]]


def test_an_error_of_the_prefill_leaves_the_cache_as_it_was() -> None:
    class Full(ToyModel):
        def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
            if self.prefills:
                raise CacheError("no memory")
            return super().prefill(prompts)

    model = Full(Markov(5))
    model.prefill([[1, 2, 3, 4]])
    with pytest.raises(CacheError):
        list(loop(model, Request((1,), 3), FixedChain([1])))
    with pytest.raises(CacheError):
        plain(model, Request((1,), 3))
    assert model.texts == [[1, 2, 3, 4]]


def test_proposers_hear_of_every_pass_and_see_the_rows_they_asked_for() -> None:
    forward = WholeText(5, 2)

    class Curious(Guesser):
        """One candidate, two rows more, the logits of the last two wanted."""

        def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
            self.seen = list(context)
            return Proposal((4, 3, 2), parents=(-1, -1, 1), candidates=1, wanted=(2, 0))

    proposer, model = Curious(), ToyModel(forward)
    pieces = loop(model, Request((1, 2), 30), proposer)
    tokens = [g.token for g in islice(pieces, 8)]
    outcome = proposer.outcomes[-1]
    assert outcome.logits is not None and outcome.logits.shape == (2, 5)
    for row, path in enumerate(([3, 2], [4])):
        expected = forward(torch.tensor([[*proposer.seen, *path]]))[0, -1]
        assert torch.equal(outcome.logits[row], expected)
    assert all(given in (tokens + [outcome.token]) for given in [o.token for o in proposer.outcomes])
    assert all(o.row == len(o.accepted) for o in proposer.outcomes)


def test_sampled_texts_have_the_plain_distribution() -> None:
    """Sequence-level chi-square: 8 tokens, texts of 3, fixed seed; what enumeration shows for smaller models."""
    markov = Markov(8, 1, seed=4, spread=0.7)
    warp = Warp(do_sample=True, repetition_penalty=1.2)
    proposer = DrawnChain(random_rows(8, 8, seed=2), 2)
    model, dice, draws = ToyModel(markov), Dice(11), 3000
    request = Request((3,), 3, warp=warp)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        given = speculate(model, request, proposer, policy=Constant(2), chance=dice, log=PassLog())
        counts[tuple(g.token for g in given)] += 1
    expected = plain_texts(markov, 3, 3, warp, [3])
    common = {text: p for text, p in expected.items() if p * draws >= 5}
    cells = [(counts[text], p * draws) for text, p in common.items()]
    cells.append((draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells)))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    degrees = len(cells) - 1
    # Wilson-Hilferty: the 99.9 % point of chi-square.
    assert degrees > 50
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3


class EmptyTree(Guesser):
    """A tree that holds no guess."""

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        return Proposal(parents=())


def test_a_tree_without_guesses_is_a_plain_step() -> None:
    request = Request((1, 2), 5)
    model = ToyModel(WholeText(7))
    assert list(loop(model, request, EmptyTree())) == plain(ToyModel(WholeText(7)), request)
    assert model.lengths == (6,)
