"""From a module to its step: what is passed to its forward, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import torchweld
from tests.zoo import ZOO
from torchweld.decoding.capture_causal import capture_causal
from torchweld.graph.capture_errors import CaptureError
from torchweld.optimizer.compile import Options


def test_a_hugging_face_model_is_captured_over_its_tokens_alone() -> None:
    program = capture_causal(ZOO["qwen2"].make(), verify=False)
    assert [node.name for node in program.placeholders if node.users] == ["input_ids"]


def test_a_model_captured_with_its_mask_decodes_too() -> None:
    model = ZOO["llama"].make()
    inputs = ZOO["llama"].inputs(2, 12)
    program = torchweld.capture(model, (), {**inputs, "use_cache": False}, verify=False)
    cached = torchweld.CachedModel(program, options=Options(threads=1))
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(
        cached.prefill(inputs["input_ids"][:, :7]), expected[:, 6], rtol=1e-4, atol=2e-4
    )
    found = cached.step(inputs["input_ids"][:, 7:], logits_for="all")
    torch.testing.assert_close(found, expected[:, 7:], rtol=1e-4, atol=2e-4)


def test_an_example_may_be_given() -> None:
    class Shifted(nn.Module):
        """Knows tokens from 100 on only."""

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.words(tokens - 100)
            return x

    program = capture_causal(Shifted(), torch.tensor([[100, 103, 105], [101, 106, 102]]))
    assert program.parameters == ("tokens",)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(CaptureError, match="cross attention has no state rule"):
        torchweld.CachedModel.from_module(transformers.T5ForConditionalGeneration(config))
