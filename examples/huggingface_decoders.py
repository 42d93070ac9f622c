"""Ten Hugging Face decoders and two encoder-decoders, small and with random weights, for commands that take
file.py:factory.

torchweld explain examples/huggingface_decoders.py:mistral --decode          # its state per layer, how masks are proved
torchweld explain examples/huggingface_decoders.py:bloom --decode --json

Copy a factory and load your own weights: it returns the model, or the model and a tuple of example inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers as hf
from torch import nn

WORDS: Final = 256
TOKENS: Final[dict[str, Any]] = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEEP: Final[dict[str, Any]] = {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED: Final[dict[str, Any]] = {**DEEP, "intermediate_size": 128, "num_key_value_heads": 2}
MIXED: Final[dict[str, Any]] = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}


def with_random_weights(
    make: Callable[..., nn.Module], config: hf.PretrainedConfig, **options: str
) -> nn.Module:
    """The model; its forward is used without its own cache, and example inputs are made up for it."""
    torch.manual_seed(0)
    return make(config, **options).eval()


def decoder(config: hf.PretrainedConfig, attention: str = "sdpa") -> nn.Module:
    """A model that writes. attention: "eager" where transformers has no other."""
    return with_random_weights(hf.AutoModelForCausalLM.from_config, config, attn_implementation=attention)


def llama() -> nn.Module:
    """Two query heads read one head of keys and values."""
    return decoder(hf.LlamaConfig(**GATED))


def mistral() -> nn.Module:
    """A window in every layer."""
    return decoder(hf.MistralConfig(**GATED, sliding_window=32))


def qwen3() -> nn.Module:
    """Queries and keys are normalised per head."""
    return decoder(hf.Qwen3Config(**GATED, head_dim=16))


def gemma2() -> nn.Module:
    """Soft caps on scores and logits; windows in every other layer; attention written out."""
    sizes = {**GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
    return decoder(hf.Gemma2Config(**sizes), attention="eager")


def phi3() -> nn.Module:
    """One matrix for queries, keys and values, and one for both halves of the feed-forward network."""
    return decoder(hf.Phi3Config(**GATED, max_position_embeddings=512, original_max_position_embeddings=512))


def gpt2() -> nn.Module:
    """Learned positions, which limit the length."""
    return decoder(hf.GPT2Config(**TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=512))


def gpt_neox() -> nn.Module:
    """Attention and feed-forward network side by side; half of each head is rotated."""
    return decoder(hf.GPTNeoXConfig(**DEEP, intermediate_size=128, rotary_pct=0.5))


def bloom() -> nn.Module:
    """ALiBi: scores fall with the distance; attention written out."""
    return decoder(hf.BloomConfig(**TOKENS, hidden_size=64, n_layer=2, n_head=4), attention="eager")


def olmo2() -> nn.Module:
    """Norms behind attention and feed-forward network in place of before them."""
    return decoder(hf.Olmo2Config(**GATED))


def exaone4() -> nn.Module:
    """A window layer with rotated positions, then a full one without positions."""
    return decoder(hf.Exaone4Config(**GATED, **MIXED))


def t5() -> nn.Module:
    """An encoder, and a decoder with learned biases by distance that reads it."""
    config = hf.T5Config(**TOKENS, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return with_random_weights(hf.T5ForConditionalGeneration, config)


def bart() -> nn.Module:
    """An encoder, and a decoder with learned positions that reads it; norms behind every part."""
    sizes: dict[str, Any] = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
    both = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    return with_random_weights(hf.BartForConditionalGeneration, hf.BartConfig(**TOKENS, d_model=64, **both))
