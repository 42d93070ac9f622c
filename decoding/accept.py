"""The one acceptance rule: which guesses stand, and which token follows them.

At every point of the text, with p the model's distribution there and the siblings x1, x2, ... guessed for it:

    accept x_i with probability min(1, p(x_i) / q_i(x_i));  else p := normalize(max(p - q_i, 0)), next sibling
    no sibling left: draw the token from p

q_i is what x_i was drawn from, or all on x_i where it was chosen rather than drawn: then it is accepted with
probability p(x_i), and a refusal strikes it from p. The token has the distribution p, exactly, whatever the guesses
were; so greedy decoding (p all on one token) gives the plain greedy text.

source: Leviathan et al. 2023 and Chen et al. 2023 (one guess), Miao et al. 2024, SpecInfer (siblings)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchweld.decoding.chance import Chance
from torchweld.decoding.step_model import Budget, DecodingError, Proposal
from torchweld.decoding.warp import Warp

ROOT = -1
"""The parent of a guess that follows the pending token."""


@dataclass(frozen=True)
class Verdict:
    """accepted: numbers of the accepted guesses, along one path. tokens: their tokens and the one behind them.

    rows[i] is the row of the pass whose logits gave tokens[i]: 0 for the first, then one more than the accepted guess.
    """

    accepted: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """See above."""
        return (0, *(guess + 1 for guess in self.accepted))


def judge(proposal: Proposal, logits: Tensor, text: Sequence[int], warp: Warp, chance: Chance) -> Verdict:
    """Judge a proposal by the model's logits.

    logits [1 + candidates, V], row 0 those behind `text` (which ends with the pending token), row i + 1 those behind
    guess i. The warp sees the text as far as it is accepted, so that penalties are those of plain decoding.
    """

    def pick(row: int, siblings: Sequence[int], path: Sequence[int]) -> int:
        if warp.is_greedy:
            return warp.choose(logits[row], path)
        return _settle(warp.distribution(logits[row], path), proposal, siblings, chance)

    return _walk(proposal, text, pick)


def judge_greedy(proposal: Proposal, text: Sequence[int], token_of: Callable[[int, int], int]) -> Verdict:
    """As `judge` where the most likely token always wins: token_of(row, length) is that of a row of the pass, behind a
    text of `length` tokens."""
    return _walk(proposal, text, lambda row, siblings, path: token_of(row, len(path)))


Pick = Callable[[int, Sequence[int], Sequence[int]], int]
"""(row of the pass, guesses for its place, text so far) -> the token there."""


def _walk(proposal: Proposal, text: Sequence[int], pick: Pick) -> Verdict:
    """The verdict where `pick` says which token follows."""
    path = list(text)
    accepted: list[int] = []
    # Guesses with the same tokens before them stand for one place of the text: all their children are siblings.
    places = [ROOT]
    while True:
        siblings = _children(proposal, places)
        token = pick(places[0] + 1, siblings, path)
        path.append(token)
        places = [guess for guess in siblings if proposal.tokens[guess] == token]
        if not places:
            return Verdict(tuple(_ancestry(proposal, accepted)), tuple(path[len(text) :]))
        accepted = places


def _settle(distribution: Tensor, proposal: Proposal, siblings: Sequence[int], chance: Chance) -> int:
    """A token with this distribution, one of the siblings if they are worth it."""
    p = distribution.numpy()
    for guess in siblings:
        token = proposal.tokens[guess]
        if proposal.probabilities is None:
            if chance.happens(float(p[token])):
                return token
            p = p.copy()
            p[token] = 0.0
        else:
            q = proposal.probabilities[guess].numpy()
            if chance.happens(float(p[token] / q[token])):
                return token
            p = np.maximum(p - q, 0.0)
        total = float(p.sum())
        if total <= 0.0:  # p was q but for rounding: a refusal had probability 0
            return token
        p = p / total
    return chance.draw(torch.from_numpy(p))


def _children(proposal: Proposal, places: Sequence[int]) -> list[int]:
    """Candidates right behind any of the places, in order."""
    if proposal.parents is None:
        following = places[0] + 1
        return [following] if following < proposal.candidate_count else []
    return [guess for guess in range(proposal.candidate_count) if proposal.parents[guess] in places]


def _ancestry(proposal: Proposal, places: Sequence[int]) -> list[int]:
    """The path from the root to the first of the places, which all have the same tokens before them."""
    path: list[int] = []
    guess = places[0] if places else ROOT
    while guess != ROOT:
        path.append(guess)
        guess = guess - 1 if proposal.parents is None else proposal.parents[guess]
    return path[::-1]


def check_proposal(proposal: Proposal, budget: Budget, vocab_size: int, name: str) -> None:
    """DecodingError, naming the proposer, for a proposal that breaks the contract of `Proposal` or the budget."""
    if flaw := _flaw(proposal, budget, vocab_size):
        raise DecodingError(f"the proposer {name!r} gave {flaw}; this is a bug of the proposer")


def _flaw(proposal: Proposal, budget: Budget, vocab_size: int) -> str | None:
    """What is wrong with it, if anything."""
    count, candidates = len(proposal.tokens), proposal.candidate_count
    if count > budget.rows:
        return f"{count} guesses; expected at most {budget.rows}"
    if not 0 <= candidates <= count:
        return f"{candidates} candidates among {count} guesses"
    for token in proposal.tokens:
        if not 0 <= token < vocab_size:
            return f"the token {token}; expected 0 to {vocab_size - 1}"
    if any(not 0 <= guess < count for guess in proposal.wanted):
        return f"wanted rows {proposal.wanted} of {count} guesses"
    return _flaw_of_parents(proposal) or _flaw_of_probabilities(proposal, vocab_size)


def _flaw_of_parents(proposal: Proposal) -> str | None:
    parents = proposal.parents
    if parents is None:
        return None
    if len(parents) != len(proposal.tokens):
        return f"{len(parents)} parents for {len(proposal.tokens)} guesses"
    for guess, parent in enumerate(parents):
        if not ROOT <= parent < guess:
            return f"{parent} as the parent of guess {guess}; expected -1 to {guess - 1}"
    return None


def _flaw_of_probabilities(proposal: Proposal, vocab_size: int) -> str | None:
    q, candidates = proposal.probabilities, proposal.candidate_count
    if q is None:
        return None
    if q.shape != (candidates, vocab_size):
        return f"probabilities {tuple(q.shape)}; expected {(candidates, vocab_size)}"
    for guess in range(candidates):
        if not float(q[guess, proposal.tokens[guess]]) > 0.0:
            return f"guess {guess} (token {proposal.tokens[guess]}) that it was never to draw: its probability is 0"
    return None
