"""The inputs of steps of one shape in memory of their own: a step writes its numbers, and makes no tensors.

After a pass over the weights torch's code is in no cache of the processor, and one operation of it costs 10 us.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchweld.decoding.step_request import StepRequest


class StepInputs:
    """ids [B, T], past [B], positions [B, T] and numbers of rows [B n] of a step program, all int64.

    chosen: whether the rows are for choices (the other of the two inputs is then empty); None where the program gives
    logits only.
    """

    def __init__(self, batch: int, rows: int, wanted: int, chosen: bool | None) -> None:
        ends = [0]
        for count in (batch * rows, batch, batch * rows, batch * wanted):
            ends.append(ends[-1] + count)
        self._numbers = (ctypes.c_int64 * ends[-1])()
        self._ends = ends
        whole = torch.frombuffer(self._numbers, dtype=torch.int64)
        ids, past, positions, asked = (whole[start:end] for start, end in pairwise(ends))
        none = torch.zeros(0, dtype=torch.int64)
        last = {None: (asked,), False: (asked, none), True: (none, asked)}[chosen]
        self.tensors: tuple[Tensor, ...] = (ids.view(batch, rows), past, positions.view(batch, rows), *last)
        self._wanted: Tensor | None = None

    def fill(self, request: StepRequest, lengths: Sequence[int], limit: int | None) -> None:
        """Write the numbers of a request without a tree; lengths, limit: as for `StepRequest.inputs`."""
        numbers, (_, past, positions, asked, end) = self._numbers, self._ends
        numbers[:past] = [token for row in request.tokens for token in row]
        numbers[past:positions] = list(lengths)
        numbers[positions:asked] = [place for row in request.positions(lengths, limit) for place in row]
        if self._wanted is not request.wanted:
            numbers[asked:end] = request.flat_rows().tolist()
            self._wanted = request.wanted


@dataclass(frozen=True)
class PreparedStep:
    """A call of a compiled step with these inputs, and with `states` tensors of a cache behind its logits."""

    inputs: StepInputs
    call: Callable[[], tuple[object, ...]]
    states: int

    def __call__(self, request: StepRequest, lengths: Sequence[int], limit: int | None) -> tuple[object, ...]:
        """Logits, and what the step gives behind the states."""
        self.inputs.fill(request, lengths, limit)
        results = self.call()
        return results[0], *results[1 + self.states :]
