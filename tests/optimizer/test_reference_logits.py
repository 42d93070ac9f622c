"""The reference of a language model is the module itself in float64, in pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torchweld.graph.capture import capture
from torchweld.graph.float64 import to_float64
from torchweld.graph.rewrite import Refusal
from torchweld.optimizer.reference_logits import ReferenceLogits, split_reference


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_equals_the_module_in_float64(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, tmp_path)
    program = capture(model, tiny_inputs(kind))
    ids = torch.randint(0, VOCABULARY, (23,), generator=torch.Generator().manual_seed(0))
    want = to_float64(model, (ids[None],))
    assert isinstance(want, Tensor)
    reference = split_reference(program)
    assert isinstance(reference, ReferenceLogits)
    hidden = reference.hidden(ids)
    assert hidden.dtype == torch.float64 and hidden.shape == (23, 48)
    logits = torch.cat([reference.logits(hidden[:10]), reference.logits(hidden[10:])])
    torch.testing.assert_close(logits, want[0], rtol=1e-12, atol=1e-12)


class Headless(nn.Module):
    """Logits that two linears make together."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        result: Tensor = self.first(x) + self.second(x.sin())
        return result


def test_a_head_that_is_no_linear_is_refused() -> None:
    found = split_reference(capture(Headless().eval(), (torch.arange(14).reshape(2, 7),)))
    assert isinstance(found, Refusal) and "no output head" in found.reason
