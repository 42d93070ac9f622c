"""Inference with reference: guess that the text copies from texts that the user gives.

Source: Yang et al., Inference with Reference: Lossless Acceleration of Large Language Models (LLMA, 2023). It copies
the `tokens` tokens behind a match of one to five tokens; here all matches vote, the longest agreement first, and the
text itself takes part (decoding/ngram_index.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.decoding.chance import Chance
from torchweld.decoding.ngram_index import Abstain, NGramIndex
from torchweld.decoding.step_model import Budget, Outcome, Proposal
from torchweld.decoding.warp import Warp

COPY = Abstain(samples=(1,), shares=(0.5,))
"""The user said that the text copies: one occurrence is enough, unless the places contradict each other."""


class ReferenceProposer:
    """Guesses from reference texts, the prompt, and the text so far.

    references: token lists (encode them as the model's tokenizer does). tokens: guesses at most per pass. longest:
    tokens of the n-grams that find a match. Raises ValueError where there is no reference.
    """

    name = "reference"
    row_counts: tuple[int, ...] | None = None

    def __init__(
        self,
        references: Sequence[Sequence[int]],
        *,
        tokens: int = 15,
        longest: int = 5,
        abstain: Abstain = COPY,
    ) -> None:
        if not any(len(reference) > 1 for reference in references):
            raise ValueError(f"{len(references)} references; expected one of two tokens or more")
        if tokens < 1:
            raise ValueError(f"guesses of {tokens} tokens; expected at least 1")
        self.tokens, self.abstain = tokens, abstain
        self.index = NGramIndex(references, longest=longest)

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """Index the prompt behind the references; guesses are looked up, not drawn."""
        self.index.follow(prompt)

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """What follows the end of `context` in the references, or followed it before."""
        self.index.follow(context)
        return Proposal(tuple(self.index.propose(min(self.tokens, budget.chain), self.abstain)))

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn: the next context holds what was accepted."""
