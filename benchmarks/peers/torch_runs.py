"""Timing of encoders that take and give torch tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import seconds_per_call
from benchmarks.peers.inputs import LEAST_SECONDS, sentences
from benchmarks.workloads import Workload


def encode_seconds(encoder: Callable[[Tensor, Tensor], Tensor], workload: Workload) -> float:
    """Seconds of a call with `batch` full sentences, after one call that brings the weights back into the caches."""
    ids = torch.tensor(sentences(workload.batch, workload.length))
    mask = torch.ones_like(ids)
    encoder(ids, mask)
    return seconds_per_call(lambda: encoder(ids, mask), LEAST_SECONDS)
