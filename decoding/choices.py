"""Tokens of greedy decoding without the logits: what a model that can choose says of a row, and who may ask it.

    if may_choose(model, warp, logprobs):
        choices = model.choose(ids)                  the output head searches its products (passes/step_choice.py)
        token = choices.token(0, 0, text)

Penalties, bans, sampling and log-probabilities read whole rows of logits, and keep to `StepModel.step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torchweld.decoding.greedy import DecodingError
from torchweld.decoding.logits import as_array
from torchweld.decoding.step_model import LogitsFor
from torchweld.decoding.warp import Warp


@dataclass(frozen=True)
class Choices:
    """The greatest logit of every row, and its token: of equal logits the lowest, and NaN before all numbers.

    scores: float [B, n].  tokens: int64 [B, n].
    """

    scores: Tensor
    tokens: Tensor

    def token(self, sequence: int, row: int, length: int) -> int:
        """The token of a row, behind a text of `length` tokens. Raises DecodingError for NaN, as `Warp.choose` does."""
        if np.isnan(float(self.scores[sequence, row])):
            raise DecodingError(f"the logits after {length} tokens hold NaN; check the model's weights")
        return int(self.tokens[sequence, row])


@runtime_checkable
class Chooser(Protocol):
    """A StepModel that can give the choices of rows instead of their logits."""

    def choose(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Choices:
        """As `StepModel.step`, with the choices [B, n] of the rows whose logits that would give."""


def may_choose(model: object, warp: Warp, logprobs: bool) -> bool:
    """Whether the choices of `model` say all that is asked of its logits."""
    return warp.is_greedy and not warp.reads_text and not logprobs and isinstance(model, Chooser)


def choices_of(logits: Tensor) -> Choices:
    """The choices of logits [B, n, V] of any float dtype."""
    scores = as_array(logits)
    places = scores.argmax(-1)  # of NaN it takes the first too
    best = np.take_along_axis(scores, places[..., None], -1)[..., 0]
    return Choices(torch.from_numpy(best), torch.from_numpy(places))
