"""Layers that the plain models share: linears and embeddings of stored weights, norms, rotary.

Notation of all models: B batch, S sequence, d hidden size, H heads, G key heads, D head size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.graph.ops.dequantize import dequantize
from torchweld.models.weights import StoredTensor


class StoredLinear(nn.Module):
    """y = x W^T + b with W [N, K] in its stored format: x float32 [..., K] -> float32 [..., N]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, stored: StoredTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.format, self.columns = stored.format, stored.shape[-1]
        self.register_buffer("weight", stored.data)  # float32 [N, K], or uint8 [N, row_bytes]
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] -> float32 [..., N]."""
        return F.linear(x, decoded(self.weight, self.format, self.columns), self.bias)

    def extra_repr(self) -> str:
        """Shape and format, for printing."""
        return f"{self.columns} -> {self.weight.shape[0]}, {self.format}"


class StoredEmbedding(nn.Module):
    """Rows of a table [V, d] in its stored format: ids int64 [B, S] -> float32 [B, S, d]."""

    weight: Tensor

    def __init__(self, stored: StoredTensor) -> None:
        super().__init__()
        self.format, self.columns = stored.format, stored.shape[-1]
        self.register_buffer("weight", stored.data)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., d]. Only the rows asked for are decoded."""
        return decoded(F.embedding(ids, self.weight), self.format, self.columns)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last axis."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., d] -> float32 [..., d]."""
        return F.rms_norm(x, (self.weight.shape[0],), self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * w + b over the last axis."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., d] -> float32 [..., d]."""
        return F.layer_norm(x, (self.weight.shape[0],), self.weight, self.bias, self.eps)


def decoded(data: Tensor, format: str, columns: int) -> Tensor:
    """Stored rows as float32 [..., columns]; F32 is kept as float32 and needs no decoding."""
    return data if format == "F32" else dequantize(data, format, columns)


def inverse_frequencies(features: int, base: float) -> Tensor:
    """Rotary frequencies base^(-2i/features): float32 [features / 2]."""
    return 1.0 / base ** (torch.arange(0, features, 2, dtype=torch.float32) / features)


def rotary_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions: int64 [S], float32 [D/2] -> two float32 [S, D], halves equal."""
    angles = positions.to(inv_freq.dtype)[:, None] * inv_freq  # [S, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form: [B, H, S, D] with cos, sin [S, D] -> [B, H, S, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def split_heads(x: Tensor, head_size: int) -> Tensor:
    """[B, S, H*D] -> [B, H, S, D]."""
    return x.view(*x.shape[:-1], -1, head_size).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]."""
    return x.transpose(1, 2).flatten(2)
