"""Where randomness comes from: two questions, so that a test can answer them in every possible way.

`Dice` answers with a seeded generator. A test that answers every question both ways, and multiplies the probabilities
along the way, gets the exact distribution of what a loop gives out.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Chance(Protocol):
    """Answers to questions of chance."""

    def happens(self, probability: float) -> bool:
        """True with the given probability (0 and below: never; 1 and above: always)."""

    def draw(self, weights: Tensor) -> int:
        """A number i with probability weights[i] / sum(weights); weights float64 [V], at least one above 0."""


class Dice:
    """Chance from a torch generator on the CPU: equal seeds give equal answers, whatever the number of threads."""

    def __init__(self, seed: int | None = None, generator: torch.Generator | None = None) -> None:
        self.generator = torch.Generator() if generator is None else generator
        if seed is not None:
            self.generator.manual_seed(seed)
        elif generator is None:
            self.generator.seed()

    def happens(self, probability: float) -> bool:
        """See `Chance`; certain answers draw nothing."""
        if probability >= 1.0:
            return True
        return probability > 0.0 and self._uniform() < probability

    def draw(self, weights: Tensor) -> int:
        """See `Chance`; by the inverse of the cumulative sum."""
        shares = weights.numpy()
        sums = shares.cumsum()
        number = int(np.searchsorted(sums, self._uniform() * sums[-1], side="right"))
        if number >= shares.shape[0]:  # rounding of u * total up to total
            number = int(np.flatnonzero(shares)[-1])
        return number

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))
