"""GPT-2 decoder: LayerNorm, learned positions, causal attention from one q-k-v projection, GELU MLP.

Source: Radford et al., GPT-2 (2019); names follow the Hugging Face checkpoint, whose matrices are transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.models.layers import LayerNorm, StoredEmbedding, StoredLinear, merge_heads, split_heads
from torchweld.models.weights import Weights


@dataclass(frozen=True)
class Gpt2Config:
    """Sizes of a GPT-2 model."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    context: int
    norm_eps: float


class Gpt2Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Gpt2Config, weights: Weights, at: str) -> None:
        super().__init__()
        d, m = config.hidden, config.intermediate

        def linear(name: str, rows: int, columns: int) -> StoredLinear:
            stored = weights.take_transposed(f"{at}.{name}.weight", (rows, columns))
            return StoredLinear(stored, weights.vector(f"{at}.{name}.bias", rows))

        self.head_size = d // config.heads
        self.ln_1 = layer_norm(weights, f"{at}.ln_1", config)
        self.c_attn = linear("attn.c_attn", 3 * d, d)
        self.c_proj = linear("attn.c_proj", d, d)
        self.ln_2 = layer_norm(weights, f"{at}.ln_2", config)
        self.c_fc = linear("mlp.c_fc", m, d)
        self.mlp_proj = linear("mlp.c_proj", d, m)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, d] -> [B, S, d]."""
        qkv: Tensor = self.c_attn(self.ln_1(x))
        q, k, v = (split_heads(part, self.head_size) for part in qkv.chunk(3, dim=-1))  # [B, H, S, D]
        x = x + self.c_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        out: Tensor = x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return out


class Gpt2(nn.Module):
    """ids int64 [B, S] -> logits float32 [B, S, V]; S at most the context."""

    def __init__(self, config: Gpt2Config, weights: Weights) -> None:
        super().__init__()
        self.config = config
        table = weights.take("wte.weight", (config.vocabulary, config.hidden))
        self.wte = StoredEmbedding(table)
        self.wpe = StoredEmbedding(weights.take("wpe.weight", (config.context, config.hidden)))
        self.h = nn.ModuleList(Gpt2Layer(config, weights, f"h.{i}") for i in range(config.layers))
        self.ln_f = layer_norm(weights, "ln_f", config)
        tied = not weights.has("lm_head.weight")
        self.lm_head = StoredLinear(table if tied else weights.take("lm_head.weight", table.shape))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, S] -> float32 [B, S, V]."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))  # [B, S, d]
        for layer in self.h:
            x = layer(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


def layer_norm(weights: Weights, at: str, config: Gpt2Config) -> LayerNorm:
    """The LayerNorm over the hidden size that the checkpoint holds under `at`."""
    weight, bias = (weights.vector(f"{at}.{part}", config.hidden) for part in ("weight", "bias"))
    return LayerNorm(weight, bias, config.norm_eps)
