"""From logits to the distribution that the next token is drawn from.

Order and meaning are those of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p. All
arithmetic is float64, so that draft and target are compared (`decoding/accept.py`) without rounding of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.decoding.greedy import DecodingError

FEW = 1024
"""Tokens among which top-p looks first: sorting 262,144 takes longer than a pass of a small model."""


@dataclass(frozen=True)
class Warp:
    """How tokens are chosen. Without do_sample: the most likely one, of equals the lowest (penalized, if wished).

    temperature: logits are divided by it (0 means do_sample=False).
    top_k: only tokens as likely as the k-th (0 or None: all).
    top_p: the fewest tokens whose probabilities reach it (1: all).
    min_p: only tokens at least min_p times as likely as the likeliest (0: all).
    repetition_penalty: logits of tokens in the text are divided (where positive, else multiplied) by it (1: none).
    Raises DecodingError for a value without meaning.
    source: Keskar et al. 2019 (penalty), Fan et al. 2018 (k), Holtzman et al. 2019 (p), Nguyen et al. 2024 (min-p)
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", self.temperature, "a number of at least 0", 0.0 <= self.temperature < math.inf),
            ("top_k", self.top_k, "an integer of at least 0", (self.top_k or 0) >= 0),
            ("top_p", self.top_p, "a number above 0 and at most 1", 0.0 < self.top_p <= 1.0),
            ("min_p", self.min_p, "a number from 0 to 1", 0.0 <= self.min_p <= 1.0),
            (
                "repetition_penalty",
                self.repetition_penalty,
                "a number above 0",
                0.0 < self.repetition_penalty < math.inf,
            ),
        )
        for name, value, expected, holds in bounds:
            if not holds:
                raise DecodingError(f"{name} is {value}; expected {expected}")

    @property
    def is_greedy(self) -> bool:
        """Does the most likely token always win?"""
        return not self.do_sample or self.temperature == 0.0

    @property
    def reads_text(self) -> bool:
        """Does the distribution depend on the text by more than the logits?"""
        return self.repetition_penalty != 1.0

    def choose(self, logits: Tensor, text: Sequence[int]) -> int:
        """The most likely token after `text`, of equals the lowest; logits [V] of any float dtype.

        Raises DecodingError for NaN, which would otherwise win silently.
        """
        scores = self._penalized(logits.double(), text) if self.reads_text else logits
        best = scores.max()
        if bool(best.isnan()):
            raise DecodingError(f"the logits after {len(text)} tokens hold NaN; check the model's weights")
        # argmax promises no order among equals, and two backends must agree on ties
        return int((scores == best).nonzero()[0])

    def distribution(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """Probabilities float64 [V] of the token after `text`; logits [V] of any float dtype. Greedy: all on one token.

        Raises DecodingError for NaN, and where no token has a finite logit.
        """
        if self.is_greedy:
            certain = torch.zeros(logits.shape[0], dtype=torch.float64)
            certain[self.choose(logits, text)] = 1.0
            return certain
        scores = logits.double().cpu()
        best = float(scores.max())
        if not math.isfinite(best):
            raise DecodingError(
                f"the largest logit after {len(text)} tokens is {best}; expected a number: check the model's weights"
            )
        scores = self._penalized(scores, text)
        # The largest becomes 0, so that a tiny temperature gives 0 and -inf, never NaN.
        scores = (scores - scores.max()) / self.temperature
        scores = _keep_top_k(scores, self.top_k or 0)
        scores = _keep_top_p(scores, self.top_p)
        probabilities = scores.softmax(0)
        if self.min_p > 0.0:
            probabilities = probabilities * (probabilities >= self.min_p * probabilities.max())
            probabilities = probabilities / probabilities.sum()
        return probabilities

    def _penalized(self, scores: Tensor, text: Sequence[int]) -> Tensor:
        """Scores with those of every token in `text` made less likely, once per token."""
        if not self.reads_text or not text:
            return scores
        seen = torch.tensor(sorted(set(text)))
        values = scores[seen]
        penalty = self.repetition_penalty
        return scores.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def _keep_top_k(scores: Tensor, count: int) -> Tensor:
    """-inf for scores below the `count` largest; equals of the last stay."""
    if count == 0 or count >= scores.shape[0]:
        return scores
    least = scores.topk(count).values[-1]
    return scores.masked_fill(scores < least, -torch.inf)


def _keep_top_p(scores: Tensor, mass: float) -> Tensor:
    """-inf for all but the likeliest tokens that together reach `mass`; of equals on the border the lower stays."""
    if mass >= 1.0:
        return scores
    probabilities = scores.softmax(0)
    kept = _reaching(probabilities, mass, FEW) if probabilities.shape[0] > FEW else None
    if kept is None:
        kept = _reaching(probabilities, mass, probabilities.shape[0])
    assert kept is not None, "all tokens together reach any mass below 1"
    return torch.full_like(scores, -torch.inf).index_copy(0, kept, scores[kept])


def _reaching(probabilities: Tensor, mass: float, count: int) -> Tensor | None:
    """The fewest tokens that reach `mass`, looked for among the `count` likeliest; None where those do not tell."""
    index = probabilities.topk(count).indices.sort().values
    values, order = probabilities[index].sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    needed = max(1, int((before < mass).sum()))
    if count < probabilities.shape[0] and (needed == count or values[needed - 1] == values[-1]):
        return None  # the border, or an equal of the token on it, lies beyond
    return index[order[:needed]]
