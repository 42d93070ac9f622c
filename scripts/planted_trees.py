"""Guesses for proofs: chains and trees of every form, with what plain decoding says hidden among wrong guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torchweld.decoding.chance import Chance
from torchweld.decoding.step_model import Budget, Outcome, Proposal
from torchweld.decoding.tree import ROOT
from torchweld.decoding.warp import Warp


class PlantedTrees:
    """A `Proposer` that knows the text to come. most: guesses per pass at most.

    Every proposal grows the right path by some tokens and puts wrong ones beside and behind it, siblings with the same
    token among them; the last guesses are now and then no candidates. Some proposals are chains, right up to a place.
    """

    name = "trees"

    def __init__(self, text: Sequence[int], vocab_size: int, *, most: int = 6, seed: int = 0) -> None:
        self.text, self.vocab_size, self.most = tuple(text), vocab_size, most
        self.random = random.Random(seed)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Any number."""
        return tuple(range(1, self.most + 1))

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """Nothing to prepare."""

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """A chain or a tree, or nothing."""
        coming = self.text[len(context) :]
        count = self.random.randint(0, min(self.most, budget.rows))
        if self.random.random() < 0.3:
            right = self.random.randint(0, count)
            wrong = [self._any() for _ in range(count)]
            return Proposal((*coming[:right], *wrong[min(right, len(coming)) :])[: budget.chain])
        tokens, parents = self._grow(count, budget.depth, coming)
        candidates = count if self.random.random() < 0.7 else self.random.randint(0, count)
        wanted = tuple(sorted(self.random.sample(range(count), self.random.randint(0, count))))
        return Proposal(tokens, parents=parents, candidates=candidates, wanted=wanted)

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn."""

    def _grow(self, count: int, depth: int, coming: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens and parents of a tree with `count` guesses, no path longer than `depth`."""
        tokens: list[int] = []
        parents: list[int] = []
        heights = {ROOT: 0}
        tip = ROOT  # the end of the right path
        for guess in range(count):
            pick = self.random.random()
            open_ends = [node for node in range(ROOT, guess) if heights[node] < depth]
            on_path = pick < 0.6 and heights[tip] < min(depth, len(coming))
            parent = tip if on_path else self.random.choice(open_ends)
            is_right = on_path or (pick > 0.9 and heights[parent] < len(coming))
            tokens.append(coming[heights[parent]] if is_right else self._any())
            parents.append(parent)
            heights[guess] = heights[parent] + 1
            if on_path:
                tip = guess
        return tuple(tokens), tuple(parents)

    def _any(self) -> int:
        return self.random.randrange(self.vocab_size)
