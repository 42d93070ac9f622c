"""What decoding reads off logits, in NumPy.

torch shares an operation on 32,768 elements out to its OpenMP threads, which then spin for some milliseconds on the
core that the next pass needs (measured: a pass of 6.5 ms took 13 ms after `logits.max()`). NumPy has no such threads.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.floating[Any]]


def as_array(logits: Tensor) -> Floats:
    """Logits of any float dtype and device as an array, without a copy where that is possible."""
    logits = logits.detach().cpu()
    return (logits if logits.dtype in (torch.float32, torch.float64) else logits.float()).numpy()


def most_likely(scores: Floats) -> int | None:
    """The place of the greatest of scores [V], of equals the first; None where one of them is NaN."""
    best = int(scores.argmax())  # of NaN it takes the first too
    return None if np.isnan(scores[best]) else best


def likeliest(scores: Floats, count: int) -> list[int]:
    """The places of the `count` greatest of scores [V], the greatest first, of equals the lower."""
    size = scores.shape[0]
    found = np.arange(size)
    if count < size:
        least = np.partition(scores, size - count)[size - count]
        found = np.flatnonzero(scores >= least)
    order = np.argsort(-scores[found], kind="stable")
    places: list[int] = found[order[:count]].tolist()
    return places


def softmax(scores: Floats) -> Floats:
    """Probabilities float64 [V] of scores [V], at least one of them finite."""
    weights = np.exp(scores.astype(np.float64) - scores.max())
    probabilities: Floats = weights / weights.sum()
    return probabilities


def log_probability(logits: Tensor, token: int) -> float:
    """Natural-log probability of a token under logits [V]."""
    scores = as_array(logits).astype(np.float64)
    best = scores.max()
    return float(scores[token] - best - np.log(np.exp(scores - best).sum()))
