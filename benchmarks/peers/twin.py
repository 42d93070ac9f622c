"""Hugging Face's own model objects with exactly the weights of our files, decoded to f32.

Nothing is fetched: the configuration is ours, the weights are read by `torchweld.load_model` and decoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from torchweld import load_model
from torchweld.models.builtin import find_builtin
from torchweld.models.gemma3 import Gemma3Config
from torchweld.models.layers import StoredEmbedding, StoredLinear, decoded
from torchweld.models.llama import LlamaConfig


class SentenceVectors(nn.Module):
    """BERT, the mean over tokens, unit length: ids, mask int64 [B, S] -> float [B, d]. What our encoder computes."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.bert: Any = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """As above."""
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


def language_model(name: str, dtype: torch.dtype) -> Any:
    """A LlamaForCausalLM or Gemma3ForCausalLM in eval mode. TypeError for a model of another kind."""
    module = load_model(name).module
    config: Any = module.config
    if type(config) not in _BUILDERS:
        raise TypeError(f"no Hugging Face twin for {name!r} with a {type(config).__name__}")
    twin, norm_offset = _BUILDERS[type(config)](config)
    state = {
        f"model.{key}": value for key, value in _decoded_state(module).items() if key != "lm_head.weight"
    }
    # Hugging Face's Gemma holds norm weights as w, GGUF as w + 1
    state = {key: v - norm_offset if key.endswith("norm.weight") else v for key, v in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    twin.load_state_dict(state, strict=True, assign=True)
    return twin.eval().requires_grad_(False).to(dtype)


def sentence_model(dtype: torch.dtype, attention: str = "sdpa") -> SentenceVectors:
    """MiniLM from its own folder, in eval mode."""
    bert = transformers.BertModel.from_pretrained(
        find_builtin("minilm"), add_pooling_layer=False, attn_implementation=attention
    )
    model: SentenceVectors = SentenceVectors(bert).eval().requires_grad_(False).to(dtype)
    return model


def _decoded_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights by name, decoded to f32 (a tensor that two layers share is decoded once)."""
    state: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if isinstance(part, StoredLinear | StoredEmbedding):
            if path != "lm_head" or "embed_tokens.weight" not in state:
                state[f"{path}.weight"] = decoded(part.weight, part.format, part.columns).clone()
        elif path.endswith("norm"):
            state[f"{path}.weight"] = part.get_buffer("weight").clone()
    return state


def _llama(config: LlamaConfig) -> tuple[Any, float]:
    settings = transformers.LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        rope_theta=config.rope_base,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model, 0.0


def _gemma3(config: Gemma3Config) -> tuple[Any, float]:
    kinds = ["full_attention" if is_global else "sliding_attention" for is_global in config.is_global]
    settings = transformers.Gemma3TextConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=len(config.is_global),
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_size,
        query_pre_attn_scalar=round(config.query_scale**-2),
        sliding_window=config.window,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.context,
        layer_types=kinds,
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(settings)
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden**0.5)
    return model, 1.0


_BUILDERS: Mapping[type, Callable[[Any], tuple[Any, float]]] = {LlamaConfig: _llama, Gemma3Config: _gemma3}
