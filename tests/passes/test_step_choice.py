"""The second way to end a step: choices of rows are those of the logits, and only where the head can make them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchweld.decoding.step_source import derive
from torchweld.graph.capture import capture
from torchweld.graph.rewrite import Refusal
from torchweld.passes.rewrite_kv_cache import StepProgram, with_tree
from torchweld.passes.step_choice import with_choices


class Tiny(nn.Module):
    """Embedding, a cumulative sum and a capped head: enough of a causal model."""

    def __init__(self, joined: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.joined = nn.Embedding(19, 8), nn.Linear(8, 19), joined

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).cumsum(1)
        logits = torch.tanh(self.head(F.rms_norm(x, (8,))) / 3) * 3
        return torch.cat([logits, x], -1) if self.joined else logits


def step_of(model: nn.Module) -> StepProgram:
    return derive(capture(model, (torch.zeros(2, 7, dtype=torch.int64),)))


def test_choices_stand_behind_the_caches_and_are_those_of_the_logits() -> None:
    step = step_of(Tiny())
    found = with_choices(step)
    assert isinstance(found, StepProgram) and found.chooses and not step.chooses
    assert found.program.parameters[3:5] == ("rows", "chosen")
    ids, past = torch.tensor([[1, 2, 3]]), torch.tensor([4])
    positions, state, rows = (
        torch.tensor([[4, 5, 6]]),
        torch.zeros(1, 1, 16, 8, dtype=torch.float64),
        torch.tensor([0, 2, 1]),
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    logits, *_ = step.program.graph_module(ids, past, positions, rows, state.clone())
    again, _, scores, tokens = found.program.graph_module(ids, past, positions, nothing, rows, state.clone())
    assert again.shape == (1, 0, 19)
    assert torch.equal(tokens, logits.argmax(-1)) and torch.equal(scores, logits.amax(-1))


def test_a_tree_may_choose_too() -> None:
    found = with_choices(with_tree(step_of(Tiny())))
    assert isinstance(found, StepProgram)
    assert found.program.parameters[3:6] == ("rows", "chosen", "path")


def test_refuses_logits_that_are_more_than_a_linear() -> None:
    refusal = with_choices(step_of(Tiny(joined=True)))
    assert isinstance(refusal, Refusal) and "no linear of the chosen rows" in refusal.reason


def test_refuses_16_bit_logits() -> None:
    refusal = with_choices(step_of(Tiny().bfloat16()))
    assert isinstance(refusal, Refusal) and "compared as they are rounded" in refusal.reason
