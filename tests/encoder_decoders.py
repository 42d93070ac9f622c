"""Tiny encoder-decoders with random weights: Hugging Face's and our own, and what they read.

Encoders are as deep as decoders: Hugging Face's own caches, which generate uses, expect that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 37
START, END = 3, 2
SHARED: dict[str, Any] = {
    "tie_word_embeddings": False,
    "vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": START,
}  # fmt: skip
LAYERS: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip


def _t5(feed_forward: str, layers: int) -> nn.Module:
    config = hf.T5Config(
        **SHARED, d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_decoder_layers=layers, num_heads=2,
        feed_forward_proj=feed_forward, relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**SHARED, **LAYERS, max_position_embeddings=32))


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        **SHARED, **LAYERS, num_mel_bins=6, max_source_positions=10, max_target_positions=32, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: _t5("relu", 2),
    "t5 gated": lambda: _t5("gated-gelu", 1),
    "bart": _bart,
    "whisper": _whisper,
}


@lru_cache
def hugging_face(name: str) -> nn.Module:
    """The model with weights that are large enough for its greedy tokens to vary."""
    model = HUGGING_FACE[name]().eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 1.5)
    return model


def draw_source(name: str, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """What the encoder reads, by name: tokens, or the features of a sound."""
    draw = torch.Generator().manual_seed(seed)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 6, 20, generator=draw)}
    return {"input_ids": torch.randint(4, WORDS, (batch, length), generator=draw)}


def draw_tokens(batch: int, length: int, seed: int) -> Tensor:
    """Tokens [batch, length] of a decoder."""
    return torch.randint(4, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


class Translator(nn.Module):
    """One layer of encoder and one of decoder, (source, target) -> logits; `variant` says what is odd about it."""

    width, heads, places_count = 12, 2, 40

    def __init__(self, variant: str = "plain") -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.variant = variant
        shapes = {
            "words": (WORDS, self.width),
            "places": (self.places_count, self.width),
            "bias": (9, self.heads),
        }
        shapes |= dict.fromkeys(
            ("eq", "ek", "ev", "dq", "dk", "dv", "cq", "ck", "cv"), (self.width, self.width)
        )
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=draw) * 0.5))

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor | None = None) -> Tensor:
        memory = self.encode(source, source_mask)
        x = F.embedding(target, self.words) + self.places[: target.shape[1]]
        if self.variant == "pooled":
            x = x + memory.mean(1, keepdim=True)
        x = x + self.attend(x, x, "d", mask=self.distance_bias(target), causal=True)
        keys = memory
        if self.variant == "tokens in keys":
            keys = memory + x.mean(1, keepdim=True)
        mask = None if source_mask is None else (source_mask != 0)[:, None, None, :]
        x = x + self.attend(x, keys, "c", mask=mask, causal=self.variant == "diagonal")
        return F.linear(F.layer_norm(x, (self.width,)), self.words)

    def encode(self, source: Tensor, source_mask: Tensor | None) -> Tensor:
        x = F.embedding(source, self.words) + self.places[: source.shape[1]].flip(0)
        mask = None if source_mask is None else (source_mask != 0)[:, None, None, :]
        return x + self.attend(x, x, "e", mask=mask, causal=self.variant == "causal encoder")

    def attend(self, x: Tensor, memory: Tensor, name: str, mask: Tensor | None, causal: bool) -> Tensor:
        def heads(value: Tensor, weight: Tensor) -> Tensor:
            return F.linear(value, weight).unflatten(2, (self.heads, -1)).transpose(1, 2)

        query, key = heads(x, getattr(self, name + "q")), heads(memory, getattr(self, name + "k"))
        value = heads(memory, getattr(self, name + "v"))
        if causal and mask is not None:
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            mask, causal = mask.masked_fill(hidden, float("-inf")), False
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return mixed.transpose(1, 2).flatten(2)

    def distance_bias(self, target: Tensor) -> Tensor | None:
        """A number per head and distance, and one that no distance decides: their positions modulo 3."""
        if self.variant != "biased":
            return None
        place = torch.arange(target.shape[1])
        distance = (place[:, None] - place[None, :]).clamp(0, 8)
        both = (place[:, None] % 3) * (place[None, :] % 3)
        return F.embedding(distance, self.bias).permute(2, 0, 1)[None] + both * 0.1
