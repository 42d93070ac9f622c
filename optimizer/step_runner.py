"""Run a compiled step over a text in chunks of rows, with a cache that has room for all of it.

runner = StepRunner(step, compiled, positions=2000)
logits = runner(ids[:512])           # [512, V]; the next call continues behind it

The least that a measurement needs: one text, no rollback, no growth. decoding/cached.py is what generates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.optimizer.compile import Compiled
from torchweld.passes.step_program import StepProgram


class StepRunner:
    """A step and the states of one sequence of at most `positions` positions."""

    def __init__(self, step: StepProgram, compiled: Compiled, positions: int) -> None:
        self._compiled, self._positions, self._past = compiled, positions, 0
        # Position j of a window's ring is in slot j mod C, so a ring with a slot for every position never turns.
        self._caches = [
            torch.zeros(1, state.heads, positions, features, dtype=state.dtype)
            for state in step.states
            for features in state.features
        ]

    def __call__(self, ids: Tensor) -> Tensor:
        """The logits [T, V] of all rows of ids int64 [T]. ValueError where they do not fit behind what was run."""
        count = ids.shape[0]
        if not 0 < count <= self._positions - self._past:
            left = self._positions - self._past
            raise ValueError(f"{count} rows behind {self._past} positions; expected 1 to {left}")
        past = torch.tensor([self._past])
        rows = torch.arange(count)
        logits, *written = self._compiled(
            ids[None].contiguous(), past, past[:, None] + rows, rows, *self._caches
        )
        for held, result in zip(self._caches, written, strict=True):
            assert isinstance(result, Tensor)
            if result.data_ptr() != held.data_ptr():  # an eager run gives copies
                held.copy_(result)
        self._past += count
        assert isinstance(logits, Tensor)
        return logits.reshape(count, -1)
