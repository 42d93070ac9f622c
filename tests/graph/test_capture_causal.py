"""From a module to its step: what is passed to its forward, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import torchweld
from tests.encoder_decoders import draw_source, hugging_face
from tests.zoo import ZOO
from torchweld.graph.capture_causal import capture_causal
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.match import shape_of
from torchweld.optimizer.compile import Options


def test_a_hugging_face_model_is_captured_over_its_tokens_alone() -> None:
    program = capture_causal(ZOO["qwen2"].make(), verify=False)
    assert [node.name for node in program.placeholders if node.users] == ["input_ids"]


@pytest.mark.parametrize("name", ["llama", "bloom"])  # bloom counts positions by summing up the mask
def test_a_model_captured_with_its_mask_decodes_too(name: str) -> None:
    model = ZOO[name].make()
    inputs = ZOO[name].inputs(2, 12)
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


def test_positional_examples_are_given_by_name_where_the_model_has_a_cache_of_its_own() -> None:
    source, text = torch.arange(18).reshape(2, 9), torch.arange(14).reshape(2, 7)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    program = capture_causal(t5, (source, torch.ones_like(source), text), verify=False)
    read = {node.name for node in program.placeholders if node.users}
    assert read == {"input_ids", "attention_mask", "decoder_input_ids"}
    lone = capture_causal(ZOO["qwen2"].make(), (text,), verify=False)
    assert [node.name for node in lone.placeholders if node.users] == ["input_ids"]
    assert len(lone.outputs) == 1, "keys and values are no outputs"


def test_positional_examples_of_other_modules_stay_positional() -> None:
    class Several(nn.Module):
        def forward(self, *parts: Tensor) -> Tensor:
            return parts[0] * parts[1]

    tensors = torch.ones(2, 7), torch.ones(2, 7)
    assert len(capture_causal(Several(), tensors, verify=False).placeholders) == 2


def test_an_encoder_decoder_is_captured_over_both_texts() -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    program = capture_causal(transformers.T5ForConditionalGeneration(config), verify=False)
    read = {node.name: shape_of(node)[1] for node in program.placeholders if node.users}
    assert set(read) == {"input_ids", "decoder_input_ids"}
    assert read["input_ids"] != read["decoder_input_ids"], "two lengths that vary on their own"


def test_what_an_encoder_reads_must_be_given_where_it_is_no_text() -> None:
    model = hugging_face("whisper")
    with pytest.raises(CaptureError, match="an example of all its inputs by name"):
        capture_causal(model)
    program = capture_causal(model, draw_source("whisper", 2, 0, 0), verify=False)
    assert [node.name for node in program.placeholders if node.users] == [
        "input_features",
        "decoder_input_ids",
    ]
