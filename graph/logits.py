"""Compare the next-token distributions of two runs of a language model.

An addition to the element-wise verdict of graph/compare.py, never a substitute: a mean hides a wrong row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitComparison:
    """Next-token distributions of two runs: KL(reference || actual) in nats, and whether greedy decoding
    agrees.

    lost_gap: how much reference logit the actual choices give away at most; 0.0 if all agree. A disagreement
    whose gap is within the logits' own error is a tie, not a fault.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float
    first_disagreement: tuple[int, ...] | None
    lost_gap: float


def compare_logits(actual: Tensor, reference: Tensor) -> LogitComparison:
    """Compare logits [..., V] of any float dtype in float64, position by position.

    NaN in `actual` gives an infinite KL. Raises ValueError if the shapes differ or there is no position.
    """
    if actual.shape != reference.shape or actual.numel() == 0:
        raise ValueError(
            f"compare_logits: shapes {tuple(actual.shape)} and {tuple(reference.shape)}, expected equal"
        )
    mine, right = actual.double(), reference.double()
    kl = kl_rows(right.log_softmax(-1), mine.log_softmax(-1))
    choice, best = mine.argmax(-1), right.argmax(-1)
    gap = right.amax(-1) - right.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    differs = choice != best
    return LogitComparison(
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        top1_agreement=1.0 - differs.double().mean().item(),
        first_disagreement=tuple(differs.nonzero()[0].tolist()) if bool(differs.any()) else None,
        lost_gap=gap.max().item(),
    )


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of every row: float64 log-probabilities [..., V] twice -> [...]; NaN in q counts as infinite.

    Rounding may make it negative by about 1e-16, which is 0.
    """
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(-1).nan_to_num(nan=math.inf).clamp(min=0.0)
