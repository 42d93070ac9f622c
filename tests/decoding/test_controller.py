"""The controller on a simulated clock: never slower than plain by more than 3 %, and fast where guesses stand."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding.guessing import Guesser
from tests.decoding.toy_models import ToyModel, WholeText
from torchweld.decoding.chance import Chance, Dice
from torchweld.decoding.controller import SHARE, STAKE, Controller, break_even
from torchweld.decoding.lookahead import LookaheadProposer
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.pass_costs import PassCosts
from torchweld.decoding.request import Request
from torchweld.decoding.speculative import speculate
from torchweld.decoding.statistics import PassLog, Statistics
from torchweld.decoding.step_model import Budget, LogitsFor, Proposal, Proposer
from torchweld.decoding.warp import Warp

FLAT = PassCosts((1, 9, 17), (1.0, 1.2, 2.0))
STEEP = PassCosts((1, 2, 5), (1.0, 1.6, 4.0))


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedModel(ToyModel):
    """A model whose passes take what `costs` says, times `slow`."""

    def __init__(self, forward: WholeText, clock: Clock, costs: PassCosts, slow: float = 1.0) -> None:
        super().__init__(forward)
        self.clock, self.costs, self.slow = clock, costs, slow

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        rows = int(ids.shape[1])
        self.clock.now += self.costs.seconds[0] * self.costs.ratio(rows) * (self.slow if rows > 1 else 1.0)
        return super().step(ids, counts=counts, parents=parents, logits_for=logits_for)


class Oracle(Guesser):
    """Knows the text; guess i is right with probability `rate`, and costs `cost` seconds."""

    name = "oracle"

    def __init__(self, forward: WholeText, clock: Clock, rate: float, cost: float) -> None:
        super().__init__()
        self.model, self.clock, self.rate, self.cost = forward, clock, rate, cost

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        self.dice = Dice(1)

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        text = list(context)
        for _ in range(budget.chain):
            self.clock.now += self.cost
            token = int(self.model(torch.tensor([text]))[0, -1].argmax())
            right = self.dice.happens(self.rate)
            text.append(token if right else (token + 1) % self.model.vocab_size)
        return Proposal(tuple(text[len(context) :]))


def run(
    proposer: Proposer,
    forward: WholeText,
    clock: Clock,
    told: PassCosts,
    real: PassCosts,
    tokens: int,
    slow: float = 1.0,
) -> Statistics:
    model, log = TimedModel(forward, clock, real, slow), PassLog()
    guess = proposer.cost if isinstance(proposer, Oracle) else None
    policy = Controller(told, row_counts=proposer.row_counts, guess_seconds=guess)
    request = Request((1, 2, 3), tokens)
    given = list(speculate(model, request, proposer, policy=policy, chance=Dice(0), log=log, clock=clock))
    assert len(given) == tokens
    return log.freeze(tokens)


def ratio(statistics: Statistics) -> float:
    """Time against plain decoding of as many tokens, a plain pass taking 1 second."""
    return statistics.decode_seconds / statistics.given_in_passes


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([0.0, 0.05, 0.2, 0.4, 0.6]),
    cost=st.sampled_from([0.0, 0.05, 0.3, 0.8]),
    costs=st.sampled_from([FLAT, STEEP]),
    tokens=st.integers(40, 300),
    seed=st.integers(0, 20),
)
def test_never_three_percent_slower_than_plain(
    rate: float, cost: float, costs: PassCosts, tokens: int, seed: int
) -> None:
    clock, forward = Clock(), WholeText(50, seed)
    statistics = run(Oracle(forward, clock, rate, cost), forward, clock, costs, costs, tokens)
    assert ratio(statistics) <= 1.03


@pytest.mark.parametrize("proposer", [LookupProposer(), LookaheadProposer()])
@pytest.mark.parametrize("costs", [FLAT, STEEP])
def test_text_that_never_repeats_costs_no_three_percent(proposer: Proposer, costs: PassCosts) -> None:
    clock = Clock()
    statistics = run(proposer, WholeText(2000, 3, states=4999), clock, costs, costs, 250)
    assert ratio(statistics) <= 1.03


@pytest.mark.parametrize("cost", [0.0, 0.3])
def test_wrongly_measured_costs_are_noticed(cost: float) -> None:
    """Passes of many rows cost twice what was measured: one surprise, and then no more than the account has."""
    clock, forward = Clock(), WholeText(50, 2)
    statistics = run(Oracle(forward, clock, 0.1, cost), forward, clock, FLAT, FLAT, 300, slow=2.0)
    assert ratio(statistics) <= 1.03


@pytest.mark.parametrize(
    ("rate", "cost", "least"), [(1.0, 0.0, 5.0), (0.9, 0.0, 3.0), (0.8, 0.1, 1.7), (0.7, 0.2, 1.2)]
)
def test_good_guesses_are_used(rate: float, cost: float, least: float) -> None:
    clock, forward = Clock(), WholeText(50, 2)
    statistics = run(Oracle(forward, clock, rate, cost), forward, clock, FLAT, FLAT, 400)
    assert 1.0 / ratio(statistics) >= least


def test_a_source_that_becomes_good_is_found_again() -> None:
    clock, forward = Clock(), WholeText(50, 2)

    class Late(Oracle):
        def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
            self.rate = 0.0 if len(context) < 150 else 1.0
            return super().propose(context, budget)

    statistics = run(Late(forward, clock, 0.0, 0.02), forward, clock, FLAT, FLAT, 700)
    assert ratio(statistics) <= 0.6


def test_a_source_that_becomes_bad_is_left() -> None:
    clock, forward = Clock(), WholeText(50, 2)

    class Tiring(Oracle):
        def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
            self.rate = 1.0 if len(context) < 100 else 0.0
            return super().propose(context, budget)

    model, log = TimedModel(forward, clock, STEEP), PassLog()
    proposer = Tiring(forward, clock, 1.0, 0.1)
    request = Request((1, 2, 3), 500)
    list(speculate(model, request, proposer, policy=Controller(STEEP), chance=Dice(0), log=log, clock=clock))
    after = [entry for place, entry in enumerate(log.passes) if place > 200]
    seconds = sum(entry.seconds + entry.proposal_seconds for entry in after)
    assert seconds <= 1.03 * sum(entry.given for entry in after) + STAKE


def test_bounds_promised_are_those_set() -> None:
    assert STAKE / 34 + SHARE <= 0.03


def test_no_guesses_without_a_budget() -> None:
    controller = Controller(FLAT)
    assert controller.rows(Budget(0, 0)) == 0


def test_break_even() -> None:
    free = PassCosts((1, 9), (1.0, 1.0))
    assert break_even(free) == pytest.approx(0.0, abs=1e-9)
    # One guess for a pass of twice the price never pays for less than certainty, and dearer ones not even then.
    assert break_even(PassCosts((1, 2), (1.0, 2.0)), most=1) == pytest.approx(1.0)
    assert break_even(PassCosts((1, 2), (1.0, 2.2)), most=1) is None
    assert break_even(PassCosts((1, 2), (1.0, 1.1)), guess_cost=0.3, most=1) == pytest.approx(0.4)
    rate = break_even(FLAT, 0.2)
    assert rate is not None
    gains = [sum(rate**i for i in range(k + 1)) / (FLAT.ratio(k + 1) + 0.2 * k) for k in range(1, 9)]
    assert max(gains) == pytest.approx(1.0, abs=1e-6)
