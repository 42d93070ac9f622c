"""Guesses from a smaller model with the same vocabulary (speculative sampling).

The draft runs one token at a time behind the text; what it has cached beyond the accepted text is rolled back when it
is asked next, not when guesses are judged, so that nothing depends on who remembers what. Its logits are warped as the
target's are. A draft whose logits are longer or shorter than the target's (padding) never guesses what only one of
them knows.

source: Leviathan et al. 2023, Chen et al. 2023; the confidence at which drafting ends: transformers (Dynamic
Speculation Lookahead, Mamou et al. 2024)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torchweld.decoding.cache import CacheError
from torchweld.decoding.chance import Chance
from torchweld.decoding.logits import as_array, log_probability
from torchweld.decoding.step_model import Budget, DecodingError, Outcome, Proposal, StepModel
from torchweld.decoding.warp import Warp


@runtime_checkable
class HasVocabulary(Protocol):
    """A tokenizer that tells its vocabulary."""

    def get_vocab(self) -> Mapping[str, int]:
        """Token text -> id, special tokens included."""


def shared_vocabulary(
    target: Mapping[str, int], draft: Mapping[str, int], target_size: int, draft_size: int
) -> Tensor:
    """Which of the target's tokens the draft may guess: bool [target_size].

    Raises DecodingError where an id is one token in one vocabulary and another token in the other, or a token has two
    ids: the draft's text would be another text. Ids that only one of them has (padding, tokens added to one) are not
    guessed.
    """
    by_id = {number: text for text, number in draft.items()}
    usable = torch.zeros(target_size, dtype=torch.bool)
    for text, number in target.items():
        other = by_id.get(number)
        if other is not None and other != text:
            raise DecodingError(
                f"the draft's vocabulary is another one: token {number} is {text!r:.40} for the target and "
                f"{other!r:.40} for the draft; give a draft with the target's tokenizer"
            )
        if draft.get(text, number) != number:
            raise DecodingError(
                f"the draft's vocabulary is another one: {text!r:.40} is token {number} for the target and token "
                f"{draft[text]} for the draft; give a draft with the target's tokenizer"
            )
        if other is not None and number < min(target_size, draft_size):
            usable[number] = True
    if not bool(usable.any()):
        raise DecodingError(
            "the draft's vocabulary shares no token with the target's; give one with its tokenizer"
        )
    return usable


class DraftModel:
    """A `Proposer` over a StepModel. usable: bool [V of the target], the tokens that it may guess; None for all.

    confidence: it guesses no further behind a guess that it holds for less probable than this.
    """

    name = "draft"
    row_counts: tuple[int, ...] | None = None

    def __init__(self, model: StepModel, *, usable: Tensor | None = None, confidence: float = 0.4) -> None:
        self.model, self.confidence = model, confidence
        self._size = model.vocab_size if usable is None else usable.shape[0]
        self._barred = np.zeros(0, dtype=np.intp) if usable is None else np.flatnonzero(~usable.numpy())
        self._cached: list[int] = []
        self._agreed = 0  # tokens at the beginning of `_cached` that are known to be the text's

    @classmethod
    def checked(
        cls,
        model: StepModel,
        target_size: int,
        tokenizer: object,
        draft_tokenizer: object,
        confidence: float = 0.4,
    ) -> DraftModel:
        """A draft for a target with logits [.., target_size] whose tokenizers were compared by content.

        Raises DecodingError where they differ or cannot be compared. One and the same object counts as equal.
        """
        if tokenizer is None or draft_tokenizer is None:
            raise DecodingError(
                "a draft must have the target's vocabulary, and without tokenizers nobody can tell: give tokenizer= "
                "and assistant_tokenizer= (the same object where they share it)"
            )
        if tokenizer is draft_tokenizer:
            usable = torch.arange(target_size) < model.vocab_size
        else:
            target, draft = _vocabulary(tokenizer, "target"), _vocabulary(draft_tokenizer, "draft")
            usable = shared_vocabulary(target, draft, target_size, model.vocab_size)
        return cls(model, usable=usable, confidence=confidence)

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """Read the prompt."""
        self.warp, self.chance = warp, chance
        self._cached, self._agreed = [], 0
        if not self._too_long(prompt):
            self._restart(prompt)

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """A path of guesses; nothing where the text is longer than the draft can hold."""
        if budget.chain < 1 or self._too_long(context):
            return Proposal()
        logits = self._follow(context)
        text, tokens, rows = list(context), [], []
        while True:
            token, row, probability = self._guess(logits, text)
            text.append(token)
            tokens.append(token)
            rows.append(row)
            if len(tokens) == budget.chain or probability < self.confidence or self._too_long(text):
                break
            logits = self._feed([token])
        chosen = [row.numpy() for row in rows if row is not None]
        return Proposal(tuple(tokens), torch.from_numpy(np.stack(chosen)) if chosen else None)

    def observe(self, outcome: Outcome) -> None:
        """Nothing: the next context tells what was accepted."""

    def _guess(self, logits: Tensor, text: Sequence[int]) -> tuple[int, Tensor | None, float]:
        """A token, the distribution that it was drawn from (None if it was chosen), and how sure the draft is of it."""
        if self.warp.is_greedy:
            token = self.warp.choose(logits, text)
            sure = math.exp(log_probability(logits, token)) if self.confidence > 0.0 else 1.0
            return token, None, sure
        row = self.warp.distribution(logits, text)
        token = self.chance.draw(row)
        return token, row, float(row[token])

    def _follow(self, context: Sequence[int]) -> Tensor:
        """Logits [V of the target] behind `context`; the cache then holds all of it."""
        common = min(self._agreed, len(context) - 1)
        most = min(len(self._cached), len(context) - 1)
        while common < most and self._cached[common] == context[common]:
            common += 1
        try:
            if common == 0:
                return self._restart(context)
            if common < len(self._cached):
                self.model.truncate(common)
                del self._cached[common:]
            return self._feed(context[common:])
        except CacheError:  # what was rolled back is no longer held (a ring): read the text again
            return self._restart(context)
        finally:
            self._agreed = len(self._cached)

    def _restart(self, context: Sequence[int]) -> Tensor:
        self._cached, self._agreed = [], 0
        logits = self.model.prefill([context])[0]
        self._cached = list(context)
        return self._matched(logits)

    def _feed(self, tokens: Sequence[int]) -> Tensor:
        logits = self.model.step(torch.tensor([list(tokens)]))[0, 0]
        self._cached.extend(tokens)
        return self._matched(logits)

    def _matched(self, logits: Tensor) -> Tensor:
        """The draft's logits in the target's length; -inf where it must not guess."""
        given = as_array(logits)
        if given.shape[0] == self._size and not len(self._barred):
            return logits
        matched = np.full(self._size, -np.inf, dtype=given.dtype)
        count = min(self._size, given.shape[0])
        matched[:count] = given[:count]
        matched[self._barred] = -np.inf
        return torch.from_numpy(matched)

    def _too_long(self, text: Sequence[int]) -> bool:
        return self.model.max_length is not None and len(text) > self.model.max_length


def _vocabulary(tokenizer: object, whose: str) -> Mapping[str, int]:
    if not isinstance(tokenizer, HasVocabulary):
        raise DecodingError(
            f"the {whose}'s tokenizer is a {type(tokenizer).__name__} without get_vocab(); expected one that tells its "
            "vocabulary, so that the two can be compared"
        )
    return tokenizer.get_vocab()
