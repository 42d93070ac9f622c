"""Between two passes torch works on nothing large: its OpenMP threads would spin where the next pass runs
(docs/decisions/0008)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.decoding.toy_models import ToyModel, WholeText
from torchweld.decoding.draft_model import DraftModel
from torchweld.decoding.generate import generate
from torchweld.decoding.lookahead import LookaheadProposer
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.step_model import Proposer

SHARED_OUT = 32768
"""Elements from which on torch shares an operation out (`at::internal::GRAIN_SIZE`)."""
VOCABULARY = 40_000
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


class Large(TorchDispatchMode):
    """Notes what touches many elements; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
        if not func.is_view and any(tensor.numel() >= SHARED_OUT for tensor in tensors):
            self.names.append(str(func))
        return result


class Hidden(ToyModel):
    """A model whose own operations are not noted."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        with _disable_current_modes():
            return super().prefill(prompts)

    def step(self, ids: Tensor, **how: Any) -> Tensor:
        with _disable_current_modes():
            return super().step(ids, **how)

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        with _disable_current_modes():
            return super().truncate(length)

    def keep(self, rows: Sequence[int]) -> None:
        with _disable_current_modes():
            super().keep(rows)


FORWARD = WholeText(VOCABULARY, states=13)
PROPOSERS: dict[str, Callable[[], Proposer | None]] = {
    "plain": lambda: None,
    "lookup": LookupProposer,
    "lookahead": LookaheadProposer,
    "draft": lambda: DraftModel(Hidden(FORWARD)),
    "a draft with another vocabulary": lambda: DraftModel(
        Hidden(FORWARD), usable=torch.arange(VOCABULARY) % 50 != 1
    ),
}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", PROPOSERS)
def test_no_large_operation_between_passes(name: str, sampled: bool) -> None:
    model, proposer = Hidden(FORWARD), PROPOSERS[name]()
    how: dict[str, Any] = {"do_sample": True, "top_k": 50, "top_p": 0.9, "seed": 0} if sampled else {}
    with Large() as large:
        generation = generate(
            model,
            PROMPT,
            max_new_tokens=12,
            eos_token_id=(),
            proposer=proposer,
            num_assistant_tokens=None if proposer is None else 6,
            num_assistant_tokens_schedule="constant",
            **how,
        )
    assert len(generation.tokens) == 12
    assert large.names == []
