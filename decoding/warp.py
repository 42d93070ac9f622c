"""From logits to the distribution that the next token is drawn from.

Order and meaning are those of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p. All
arithmetic is float64, so that draft and target are compared (`decoding/accept.py`) without rounding of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchweld.decoding.greedy import DecodingError
from torchweld.decoding.logits import Floats, as_array, most_likely, softmax

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
        scores = as_array(logits)
        if self.reads_text:
            scores = self._penalized(scores.astype(np.float64), text)
        best = most_likely(scores)
        if best is None:
            raise DecodingError(f"the logits after {len(text)} tokens hold NaN; check the model's weights")
        return best

    def distribution(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """Probabilities float64 [V] of the token after `text`; logits [V] of any float dtype. Greedy: all on one token.

        Raises DecodingError for NaN, and where no token has a finite logit.
        """
        if self.is_greedy:
            certain = torch.zeros(logits.shape[0], dtype=torch.float64)
            certain[self.choose(logits, text)] = 1.0
            return certain
        scores: Floats = as_array(logits).astype(np.float64)
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
        probabilities = softmax(scores)
        if self.min_p > 0.0:
            probabilities = probabilities * (probabilities >= self.min_p * probabilities.max())
            probabilities = probabilities / probabilities.sum()
        return torch.from_numpy(probabilities)

    def _penalized(self, scores: Floats, text: Sequence[int]) -> Floats:
        """Scores with those of every token in `text` made less likely, once per token; changes `scores`."""
        if not self.reads_text or not text:
            return scores
        seen = list(set(text))
        values = scores[seen]
        penalty = self.repetition_penalty
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        return scores


def _keep_top_k(scores: Floats, count: int) -> Floats:
    """-inf for scores below the `count` largest; equals of the last stay."""
    size = scores.shape[0]
    if count == 0 or count >= size:
        return scores
    least = np.partition(scores, size - count)[size - count]
    return np.where(scores < least, -np.inf, scores)


def _keep_top_p(scores: Floats, mass: float) -> Floats:
    """-inf for all but the likeliest tokens that together reach `mass`; of equals on the border the lower stays."""
    if mass >= 1.0:
        return scores
    probabilities = softmax(scores)
    kept = _reaching(probabilities, mass, FEW) if probabilities.shape[0] > FEW else None
    if kept is None:
        kept = _reaching(probabilities, mass, probabilities.shape[0])
    assert kept is not None, "all tokens together reach any mass below 1"
    result = np.full_like(scores, -np.inf)
    result[kept] = scores[kept]
    return result


def _reaching(probabilities: Floats, mass: float, count: int) -> NDArray[np.intp] | None:
    """The fewest tokens that reach `mass`, looked for among the `count` likeliest; None where those do not tell."""
    size = probabilities.shape[0]
    index = (
        np.arange(size)
        if count == size
        else np.sort(np.argpartition(probabilities, size - count)[size - count :])
    )
    order = np.argsort(-probabilities[index], kind="stable")
    values = probabilities[index][order]
    before = values.cumsum() - values
    needed = max(1, int((before < mass).sum()))
    if count < size and (needed == count or values[needed - 1] == values[-1]):
        return None  # the border, or an equal of the token on it, lies beyond
    result: NDArray[np.intp] = index[order[:needed]]
    return result
