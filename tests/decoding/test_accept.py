"""The acceptance rule: exact distributions by enumeration, not by sampling."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding.enumerate_chance import Scripted, exact_distribution
from tests.decoding.guessing import DrawnChain, DrawnTree, FixedChain, Guesser
from tests.decoding.toy_models import Markov, ToyModel
from torchweld.decoding.accept import check_proposal, judge
from torchweld.decoding.chance import Dice
from torchweld.decoding.request import Request
from torchweld.decoding.speculative import Constant, speculate
from torchweld.decoding.statistics import PassLog
from torchweld.decoding.step_model import Budget, DecodingError, Proposal
from torchweld.decoding.warp import Warp

SAMPLE = Warp(do_sample=True)


def random_rows(count: int, vocab: int, seed: int, zeros: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, vocab, generator=generator, dtype=torch.float64) + 0.01
    if zeros:
        rows = rows * (torch.rand(count, vocab, generator=generator) < 0.6)
        rows[:, 0] += 0.1
    return rows / rows.sum(1, keepdim=True)


def plain_texts(
    model: Markov, first: int, length: int, warp: Warp, prompt: list[int]
) -> dict[tuple[int, ...], float]:
    """Probability of every text of `length` tokens by the chain rule."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = defaultdict(float)
        for text, weight in texts.items():
            whole = [*prompt, *text]
            row = warp.distribution(model(torch.tensor([whole]))[0, -1], whole)
            for token, p in enumerate(row.tolist()):
                if p > 0.0:
                    longer[(*text, token)] += weight * p
        texts = longer
    return texts


def speculated_texts(
    model: Markov, proposer: Guesser, length: int, warp: Warp, prompt: list[int]
) -> dict[tuple[int, ...], float]:
    """Probability of every text that the whole speculative loop gives out, over all drafts and all judgements."""

    def run(chance: Scripted) -> tuple[int, ...]:
        request = Request(tuple(prompt), length, warp=warp)
        loop = speculate(ToyModel(model), request, proposer, policy=Constant(8), chance=chance, log=PassLog())
        return tuple(given.token for given in loop)

    return exact_distribution(run)


def assert_same(got: dict[tuple[int, ...], float], expected: dict[tuple[int, ...], float]) -> None:
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    for text in got.keys() | expected.keys():
        assert got.get(text, 0.0) == pytest.approx(expected.get(text, 0.0), abs=1e-12), text


WARPS = (
    SAMPLE,
    Warp(do_sample=True, temperature=0.7, top_k=2),
    Warp(do_sample=True, top_p=0.8, repetition_penalty=1.7),
    Warp(do_sample=True, min_p=0.3, repetition_penalty=0.8),
)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_drawn_chains_give_the_plain_distribution(warp: Warp, k: int) -> None:
    model = Markov(3, order=1, seed=k, spread=1.0)
    proposer = DrawnChain(random_rows(3, 3, seed=k + 10, zeros=k == 2), k)
    got = speculated_texts(model, proposer, 4, warp, [1, 2])
    assert_same(got, plain_texts(model, 2, 4, warp, [1, 2]))


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("tokens", [(0,), (4, 4), (1, 0, 2), (3, 1, 4)])
def test_chosen_chains_give_the_plain_distribution(warp: Warp, tokens: tuple[int, ...]) -> None:
    model = Markov(5, order=2, seed=3, spread=1.0)
    got = speculated_texts(model, FixedChain(tokens), 4, warp, [1])
    assert_same(got, plain_texts(model, 1, 4, warp, [1]))


def test_drawn_trees_give_the_plain_distribution() -> None:
    model = Markov(3, order=1, seed=5, spread=1.0)
    proposer = DrawnTree(random_rows(3, 3, seed=6))
    warp = Warp(do_sample=True, repetition_penalty=1.3)
    got = speculated_texts(model, proposer, 3, warp, [2])
    assert_same(got, plain_texts(model, 2, 3, warp, [2]))


class ChosenTree(Guesser):
    """Siblings and cousins with equal tokens among them."""

    def propose(self, context: list[int], budget: Budget) -> Proposal:  # type: ignore[override]
        tokens = (0, 1, 0, 2, 2, 1, 0)
        parents = (-1, -1, -1, 0, 2, 2, 4)
        return Proposal(tokens, parents=parents) if budget.rows >= len(tokens) else Proposal()


@pytest.mark.parametrize("warp", WARPS)
def test_chosen_trees_give_the_plain_distribution(warp: Warp) -> None:
    model = Markov(3, order=2, seed=8, spread=1.0)
    got = speculated_texts(model, ChosenTree(), 5, warp, [0, 2])
    assert_same(got, plain_texts(model, 2, 5, warp, [0, 2]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_judgement_of_any_tree_has_the_target_distribution(data: st.DataObject) -> None:
    """The first token behind the text, whatever the tree and whatever its tokens were drawn from."""
    vocab = data.draw(st.integers(2, 5))
    count = data.draw(st.integers(0, 4))
    parents = tuple(data.draw(st.integers(-1, guess - 1)) for guess in range(count))
    seed = data.draw(st.integers(0, 99))
    logits = torch.randn(count + 1, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = data.draw(st.booleans())
    chosen = tuple(data.draw(st.integers(0, vocab - 1)) for _ in range(count))
    q = random_rows(max(1, count), vocab, seed, zeros=data.draw(st.booleans()))[:count]

    def run(chance: Scripted) -> int:
        tokens = tuple(chance.draw(row) for row in q) if drawn else chosen
        proposal = Proposal(tokens, q if drawn else None, parents)
        return judge(proposal, logits, [0], SAMPLE, chance).tokens[0]

    expected: dict[tuple[int, ...], float] = {(t,): p for t, p in enumerate(logits[0].softmax(0).tolist())}
    assert_same({(token,): p for token, p in exact_distribution(run).items()}, expected)


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    q = logits.softmax(1)[:3]
    dice = Dice(0)
    for _ in range(50):
        tokens = tuple(dice.draw(row) for row in q)
        assert judge(Proposal(tokens, q), logits, [0], SAMPLE, dice).accepted == (0, 1, 2)


def test_greedy_takes_the_longest_path_and_the_lowest_of_equals() -> None:
    logits = torch.zeros(7, 4)
    logits[0, 2] = logits[0, 3] = 1.0  # token 2 wins
    logits[2, 1] = 1.0  # behind guess 1
    verdict = judge(Proposal((3, 2, 2, 1, 1, 0), parents=(-1, -1, -1, 0, 2, 4)), logits, [0], Warp(), Dice(0))
    # Guesses 1 and 2 are the same token: what follows the second counts too.
    assert verdict.tokens == (2, 1, 0, 0)
    assert verdict.accepted == (2, 4, 5)
    assert verdict.rows == (0, 3, 5, 6)


def test_penalties_see_the_accepted_prefix() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0], [0.0, 3.0, 2.0]])
    warp = Warp(repetition_penalty=2.0)
    assert judge(Proposal((1,)), logits, [0], warp, Dice(0)).tokens == (1, 2), "1 is penalized once it stands"


CONTRACT = [
    (Proposal((0, 1, 2)), "3 guesses; expected at most 2"),
    (Proposal((5,)), "the token 5; expected 0 to 3"),
    (Proposal((-1,)), "the token -1"),
    (Proposal((0,), candidates=2), "2 candidates among 1"),
    (Proposal((0,), wanted=(1,)), r"wanted rows \(1,\)"),
    (Proposal((0, 1), parents=(-1,)), "1 parents for 2 guesses"),
    (Proposal((0, 1), parents=(-1, 1)), "1 as the parent of guess 1; expected -1 to 0"),
    (Proposal((0, 1), torch.ones(1, 4)), r"probabilities \(1, 4\); expected \(2, 4\)"),
    (Proposal((0,), torch.tensor([[0.0, 1.0, 0.0, 0.0]])), "never to draw"),
]


@pytest.mark.parametrize(("proposal", "message"), CONTRACT)
def test_broken_proposals_are_refused_by_name(proposal: Proposal, message: str) -> None:
    with pytest.raises(DecodingError, match=message) as caught:
        check_proposal(proposal, Budget(2, 2), 4, "mine")
    assert "the proposer 'mine'" in str(caught.value)


def test_sound_proposals_pass() -> None:
    check_proposal(Proposal(), Budget(0, 0), 4, "mine")
    check_proposal(Proposal((3, 0), torch.full((2, 4), 0.25), (-1, -1)), Budget(2, 1), 4, "mine")
