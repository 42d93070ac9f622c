"""Every way that chance may go: the exact distribution of what a function of chance gives out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor

Result = TypeVar("Result", bound=Hashable)


class Scripted:
    """Chance that answers from a script, then takes the first answer that is possible, and remembers the others."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.taken: list[int] = []
        self.options: list[list[float]] = []

    def happens(self, probability: float) -> bool:
        p = min(1.0, max(0.0, probability))
        return self._answer([1.0 - p, p]) == 1

    def draw(self, weights: Tensor) -> int:
        return self._answer((weights / weights.sum()).tolist())

    def _answer(self, probabilities: list[float]) -> int:
        place = len(self.taken)
        possible = [number for number, p in enumerate(probabilities) if p > 0.0]
        answer = self.script[place] if place < len(self.script) else possible[0]
        self.taken.append(answer)
        self.options.append(probabilities)
        return answer


def exact_distribution(run: Callable[[Scripted], Result]) -> dict[Result, float]:
    """Probability of every result of `run`, by running it once for every way through its questions."""
    total: dict[Result, float] = defaultdict(float)
    script: list[int] | None = []
    while script is not None:
        chance = Scripted(script)
        result = run(chance)
        weight = 1.0
        for answer, options in zip(chance.taken, chance.options, strict=True):
            weight *= options[answer]
        total[result] += weight
        script = _next_script(chance)
    return dict(total)


def _next_script(chance: Scripted) -> list[int] | None:
    """The script that differs in the last question with an answer left, as counting does."""
    for place in reversed(range(len(chance.taken))):
        options = chance.options[place]
        later = [a for a in range(chance.taken[place] + 1, len(options)) if options[a] > 0.0]
        if later:
            return [*chance.taken[:place], later[0]]
    return None
