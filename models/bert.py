"""BERT encoder (MiniLM), and the sentence encoder that averages and normalizes its last hidden states.

Source: Devlin et al., BERT (2019); Reimers and Gurevych, Sentence-BERT (2019); names follow Hugging Face.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.models.layers import LayerNorm, StoredEmbedding, StoredLinear, merge_heads, split_heads
from torchweld.models.weights import Weights


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    context: int
    segments: int
    norm_eps: float


class BertLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: BertConfig, weights: Weights, at: str) -> None:
        super().__init__()
        d, m = config.hidden, config.intermediate

        def linear(name: str, rows: int, columns: int) -> StoredLinear:
            stored = weights.take(f"{at}.{name}.weight", (rows, columns))
            return StoredLinear(stored, weights.vector(f"{at}.{name}.bias", rows))

        self.head_size = d // config.heads
        self.query = linear("attention.self.query", d, d)
        self.key = linear("attention.self.key", d, d)
        self.value = linear("attention.self.value", d, d)
        self.attention_output = linear("attention.output.dense", d, d)
        self.attention_norm = layer_norm(weights, f"{at}.attention.output.LayerNorm", config)
        self.intermediate = linear("intermediate.dense", m, d)
        self.output = linear("output.dense", d, m)
        self.output_norm = layer_norm(weights, f"{at}.output.LayerNorm", config)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, S, d], visible bool [B, 1, 1, S] -> [B, S, d]."""
        q, k, v = (split_heads(part(x), self.head_size) for part in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # [B, H, S, D]
        x = self.attention_norm(x + self.attention_output(merge_heads(y)))
        out: Tensor = self.output_norm(x + self.output(F.gelu(self.intermediate(x))))
        return out


class Bert(nn.Module):
    """ids, attention_mask int64 [B, S] (1 = token, 0 = padding) -> last hidden states float32 [B, S, d]."""

    def __init__(self, config: BertConfig, weights: Weights) -> None:
        super().__init__()
        self.config = config
        d, at = config.hidden, "embeddings"
        words = weights.take(f"{at}.word_embeddings.weight", (config.vocabulary, d))
        places = weights.take(f"{at}.position_embeddings.weight", (config.context, d))
        segments = weights.take(f"{at}.token_type_embeddings.weight", (config.segments, d))
        self.word_embeddings = StoredEmbedding(words)
        self.position_embeddings = StoredEmbedding(places)
        self.token_type_embeddings = StoredEmbedding(segments)
        self.embedding_norm = layer_norm(weights, f"{at}.LayerNorm", config)
        self.layers = nn.ModuleList(
            BertLayer(config, weights, f"encoder.layer.{i}") for i in range(config.layers)
        )

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, S] twice -> float32 [B, S, d]. Every token is of segment 0."""
        places = self.position_embeddings(torch.arange(ids.shape[1], device=ids.device))  # [S, d]
        segment = self.token_type_embeddings(torch.zeros_like(ids))  # [B, S, d]
        x: Tensor = self.embedding_norm(self.word_embeddings(ids) + segment + places)
        visible = attention_mask.to(torch.bool)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, visible)
        return x


class SentenceEncoder(nn.Module):
    """ids, attention_mask int64 [B, S] -> unit vectors float32 [B, d]: the mean over tokens, normalized."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, S] twice -> float32 [B, d]."""
        hidden = self.bert(ids, attention_mask)
        weight = attention_mask[:, :, None].to(hidden.dtype)  # [B, S, 1]
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return F.normalize(mean, dim=-1)


def layer_norm(weights: Weights, at: str, config: BertConfig) -> LayerNorm:
    """The LayerNorm over the hidden size that the checkpoint holds under `at`."""
    weight, bias = (weights.vector(f"{at}.{part}", config.hidden) for part in ("weight", "bias"))
    return LayerNorm(weight, bias, config.norm_eps)
