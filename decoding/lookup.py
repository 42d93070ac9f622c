"""Prompt lookup: guess that the text goes on as it did after the same words before.

Source: Saxena, Prompt Lookup Decoding (2023); transformers `PromptLookupCandidateGenerator`; the abstaining rule of
llama.cpp's n-gram cache, without which guesses after one common word slow plain text down.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.decoding.chance import Chance
from torchweld.decoding.ngram_index import LAX, Abstain, NGramIndex
from torchweld.decoding.step_model import Budget, Outcome, Proposal
from torchweld.decoding.warp import Warp


class LookupProposer:
    """Guesses from the prompt and the text generated so far.

    tokens: guesses at most per pass (Hugging Face's `prompt_lookup_num_tokens`). longest: tokens of the n-grams that
    find a match (`max_matching_ngram_size`); longer matches win. abstain: when a match is too thin to be drafted.
    """

    name = "lookup"
    row_counts: tuple[int, ...] | None = None

    def __init__(self, *, tokens: int = 15, longest: int = 4, abstain: Abstain = LAX) -> None:
        if tokens < 1:
            raise ValueError(f"a lookup of {tokens} tokens; expected at least 1")
        self.tokens, self.abstain = tokens, abstain
        self.index = NGramIndex(longest=longest)

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """Index the prompt; guesses are looked up, not drawn, so `warp` and `chance` play no part."""
        self.index.follow(prompt)

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """What followed the end of `context` before."""
        self.index.follow(context)
        return Proposal(tuple(self.index.propose(min(self.tokens, budget.chain), self.abstain)))

    def observe(self, outcome: Outcome) -> None:
        """Nothing to learn: the next context holds what was accepted."""
