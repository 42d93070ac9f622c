"""Gemma 3 text decoder: local and global attention layers, norms before and after each part, GELU gate.

Every sixth layer sees all earlier positions (rotary base 1e6); the others see the last `window` (base 1e4).
Norm weights are held as w + 1, as GGUF has them, so every norm is a plain RMSNorm. The head is the embedding.
Source: Gemma 3 technical report (2025); names follow the Hugging Face checkpoint.
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
class Gemma3Config:
    """Sizes of a Gemma 3 text model. `is_global[i]`: whether layer i sees every earlier position."""

    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    window: int
    query_scale: float
    rope_base: float
    rope_local_base: float
    norm_eps: float
    context: int
    is_global: tuple[bool, ...]


class Attention(nn.Module):
    """Grouped-query attention with normalized queries and keys; causal, or causal within a window."""

    def __init__(self, config: Gemma3Config, weights: Weights, at: str) -> None:
        super().__init__()
        d, queries = config.hidden, config.heads * config.head_size
        keys = config.kv_heads * config.head_size
        self.head_size, self.scale = config.head_size, config.query_scale
        self.q_proj = StoredLinear(weights.take(f"{at}.q_proj.weight", (queries, d)))
        self.k_proj = StoredLinear(weights.take(f"{at}.k_proj.weight", (keys, d)))
        self.v_proj = StoredLinear(weights.take(f"{at}.v_proj.weight", (keys, d)))
        self.o_proj = StoredLinear(weights.take(f"{at}.o_proj.weight", (d, queries)))
        self.q_norm = RMSNorm(weights.vector(f"{at}.q_norm.weight", config.head_size), config.norm_eps)
        self.k_norm = RMSNorm(weights.vector(f"{at}.k_norm.weight", config.head_size), config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """[B, S, d], tables [S, D], visible bool [S, S] or None for causal -> [B, S, d]."""
        q = rotate(self.q_norm(split_heads(self.q_proj(x), self.head_size)), cos, sin)  # [B, H, S, D]
        k = rotate(self.k_norm(split_heads(self.k_proj(x), self.head_size)), cos, sin)  # [B, G, S, D]
        v = split_heads(self.v_proj(x), self.head_size)  # [B, G, S, D]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=self.scale, enable_gqa=True
        )
        out: Tensor = self.o_proj(merge_heads(y))
        return out


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), GELU in its tanh form."""

    def __init__(self, config: Gemma3Config, weights: Weights, at: str) -> None:
        super().__init__()
        d, m = config.hidden, config.intermediate
        self.gate_proj = StoredLinear(weights.take(f"{at}.gate_proj.weight", (m, d)))
        self.up_proj = StoredLinear(weights.take(f"{at}.up_proj.weight", (m, d)))
        self.down_proj = StoredLinear(weights.take(f"{at}.down_proj.weight", (d, m)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class Gemma3Layer(nn.Module):
    """One decoder layer; each part's result is normalized again before it is added."""

    def __init__(self, config: Gemma3Config, weights: Weights, at: str, is_global: bool) -> None:
        super().__init__()

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights.vector(f"{at}.{name}.weight", config.hidden), config.norm_eps)

        self.is_global = is_global
        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, weights, f"{at}.self_attn")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.mlp = GatedMLP(config, weights, f"{at}.mlp")
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        """[B, S, d], tables [S, D], visible bool [S, S] or None for causal -> [B, S, d]."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, visible)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        out: Tensor = x + self.post_feedforward_layernorm(y)
        return out


class Gemma3(nn.Module):
    """ids int64 [B, S] -> logits float32 [B, S, V]; no cache, every position is computed."""

    inv_freq: Tensor
    inv_freq_local: Tensor

    def __init__(self, config: Gemma3Config, weights: Weights) -> None:
        super().__init__()
        self.config = config
        table = weights.take("model.embed_tokens.weight", (config.vocabulary, config.hidden))
        self.embed_tokens = StoredEmbedding(table)
        self.layers = nn.ModuleList(
            Gemma3Layer(config, weights, f"model.layers.{i}", is_global)
            for i, is_global in enumerate(config.is_global)
        )
        self.norm = RMSNorm(weights.vector("model.norm.weight", config.hidden), config.norm_eps)
        self.lm_head = StoredLinear(table)
        self.register_buffer("inv_freq", inverse_frequencies(config.head_size, config.rope_base))
        self.register_buffer("inv_freq_local", inverse_frequencies(config.head_size, config.rope_local_base))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, S] -> float32 [B, S, V]."""
        x = self.embed_tokens(ids) * self.config.hidden**0.5  # [B, S, d]
        positions = torch.arange(ids.shape[1], device=ids.device)
        cos, sin = rotary_tables(positions, self.inv_freq)
        cos_local, sin_local = rotary_tables(positions, self.inv_freq_local)
        near = window_mask(positions, self.config.window)
        for layer in self.layers:
            x = layer(x, cos, sin, None) if layer.is_global else layer(x, cos_local, sin_local, near)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def window_mask(positions: Tensor, window: int) -> Tensor:
    """True where key j is visible to query i: i - window < j <= i. int64 [S] -> bool [S, S]."""
    query, key = positions[:, None], positions[None, :]
    return (key <= query) & (key > query - window)
