"""Proposers for tests: they draw or choose guesses in every way that the contract allows, good and bad ones."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.decoding.chance import Chance
from torchweld.decoding.step_model import Budget, Outcome, Proposal
from torchweld.decoding.warp import Warp


class Guesser:
    """A proposer with nothing to learn; what it was told is in `outcomes`."""

    name = "guesser"
    row_counts: tuple[int, ...] | None = None

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        self.warp, self.chance = warp, chance

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        return Proposal()

    def observe(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


class FixedChain(Guesser):
    """Always the same tokens, taken for certain."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = tuple(tokens)

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        return Proposal(self.tokens[: budget.chain])


class DrawnChain(Guesser):
    """k tokens drawn from distributions q[last token], with their probabilities."""

    def __init__(self, q: Tensor, k: int) -> None:
        super().__init__()
        self.q, self.k = q, k

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        token, tokens, rows = context[-1], [], []
        for _ in range(min(self.k, budget.chain)):
            rows.append(self.q[token])
            token = self.chance.draw(self.q[token])
            tokens.append(token)
        return Proposal(tuple(tokens), torch.stack(rows)) if tokens else Proposal()


class DrawnTree(Guesser):
    """Two siblings behind the pending token and one behind each of them, all drawn from q[token before]."""

    PARENTS = (-1, -1, 0, 1)

    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.q = q

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        if budget.rows < len(self.PARENTS):
            return Proposal()
        tokens: list[int] = []
        rows = []
        for parent in self.PARENTS:
            before = context[-1] if parent < 0 else tokens[parent]
            rows.append(self.q[before])
            tokens.append(self.chance.draw(self.q[before]))
        return Proposal(tuple(tokens), torch.stack(rows), parents=self.PARENTS)


class RandomGuesser(Guesser):
    """Chains and trees of any form with random tokens, now and then rows that are no candidates, or nothing."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.vocab_size, self.random = vocab_size, random.Random(seed)

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        pick = self.random
        count = pick.randint(0, min(6, budget.rows))
        tokens = tuple(pick.randrange(self.vocab_size) for _ in range(count))
        if not count or pick.random() < 0.4:
            return Proposal(tokens[: budget.chain])
        parents = tuple(pick.randint(-1, guess - 1) for guess in range(count))
        candidates = pick.randint(0, count)
        wanted = tuple(sorted(pick.sample(range(count), pick.randint(0, count))))
        return Proposal(tokens, parents=parents, candidates=candidates, wanted=wanted)
