"""Llama-family decoder (SmolLM2): RMSNorm, rotary grouped-query attention, gated SiLU MLP.

Source: Touvron et al., LLaMA (2023); names follow Hugging Face. Notation as in models/layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.models.layers import (
    RMSNorm,
    StoredEmbedding,
    StoredLinear,
    inverse_frequencies,
    merge_heads,
    rotary_tables,
    rotate,
    split_heads,
)
from torchweld.models.weights import Weights


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-family model."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    rope_base: float
    norm_eps: float
    context: int


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, weights: Weights, at: str) -> None:
        super().__init__()
        d, queries = config.hidden, config.heads * config.head_size
        keys = config.kv_heads * config.head_size
        self.head_size = config.head_size
        self.q_proj = StoredLinear(weights.take(f"{at}.q_proj.weight", (queries, d)))
        self.k_proj = StoredLinear(weights.take(f"{at}.k_proj.weight", (keys, d)))
        self.v_proj = StoredLinear(weights.take(f"{at}.v_proj.weight", (keys, d)))
        self.o_proj = StoredLinear(weights.take(f"{at}.o_proj.weight", (d, queries)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, d], tables [S, D] -> [B, S, d]."""
        q = rotate(split_heads(self.q_proj(x), self.head_size), cos, sin)  # [B, H, S, D]
        k = rotate(split_heads(self.k_proj(x), self.head_size), cos, sin)  # [B, G, S, D]
        v = split_heads(self.v_proj(x), self.head_size)  # [B, G, S, D]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(merge_heads(y))
        return out


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, weights: Weights, at: str) -> None:
        super().__init__()
        d, m = config.hidden, config.intermediate
        self.gate_proj = StoredLinear(weights.take(f"{at}.gate_proj.weight", (m, d)))
        self.up_proj = StoredLinear(weights.take(f"{at}.up_proj.weight", (m, d)))
        self.down_proj = StoredLinear(weights.take(f"{at}.down_proj.weight", (d, m)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class LlamaLayer(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, weights: Weights, at: str) -> None:
        super().__init__()
        d, eps = config.hidden, config.norm_eps
        self.input_layernorm = RMSNorm(weights.vector(f"{at}.input_layernorm.weight", d), eps)
        self.self_attn = Attention(config, weights, f"{at}.self_attn")
        after = weights.vector(f"{at}.post_attention_layernorm.weight", d)
        self.post_attention_layernorm = RMSNorm(after, eps)
        self.mlp = GatedMLP(config, weights, f"{at}.mlp")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, d], tables [S, D] -> [B, S, d]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """ids int64 [B, S] -> logits float32 [B, S, V]; no cache, every position is computed."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        table = weights.take("model.embed_tokens.weight", (config.vocabulary, config.hidden))
        self.embed_tokens = StoredEmbedding(table)
        self.layers = nn.ModuleList(
            LlamaLayer(config, weights, f"model.layers.{i}") for i in range(config.layers)
        )
        self.norm = RMSNorm(weights.vector("model.norm.weight", config.hidden), config.norm_eps)
        tied = not weights.has("lm_head.weight")
        self.lm_head = StoredLinear(table if tied else weights.take("lm_head.weight", table.shape))
        self.register_buffer("inv_freq", inverse_frequencies(config.head_size, config.rope_base))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, S] -> float32 [B, S, V]."""
        x = self.embed_tokens(ids)  # [B, S, d]
        cos, sin = rotary_tables(torch.arange(ids.shape[1], device=ids.device), self.inv_freq)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
