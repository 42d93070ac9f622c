"""Super-blocks of 256 values with quantized scales: Q4_K, Q5_K, Q6_K.

Formula: Q4_K and Q5_K hold 8 groups of 32, value = (d * sc) * q - (dmin * m), sc and m of 6 bits in 12 bytes;
Q6_K holds 16 groups of 16, value = (d * sc) * (q - 32), sc int8.
Source: ggml-quants.c (dequantize_row_q*_K); every bit checked against gguf.quants in tests/formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.graph.formats.base import StoredFormat, half_at, low_high_nibbles


@dataclass(frozen=True)
class OffsetSuperBlocks(StoredFormat):
    """Q4_K, Q5_K: d f16, dmin f16, 12 bytes of scales, (Q5_K) 32 of fifth bits, 128 of nibbles."""

    bits: int = 4

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [..., n, block_bytes] -> float32 [..., n*256]."""
        scale, minimum = six_bit_scales(data[..., 4:16])
        scale = (half_at(data, 0) * scale).unsqueeze(-1)  # [..., n, 8, 1]
        minimum = (half_at(data, 2) * minimum).unsqueeze(-1)
        quants = low_high_nibbles(data[..., -128:], 32)  # [..., n, 8, 32]
        if self.bits == 5:
            place = torch.arange(8, dtype=torch.uint8, device=data.device).unsqueeze(-1)
            quants = quants | (((data[..., None, 16:48] >> place) & 1) << 4)
        return quants.to(torch.float32).mul_(scale).sub_(minimum).flatten(-3)


@dataclass(frozen=True)
class SignedSuperBlocks(StoredFormat):
    """Q6_K: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 int8 scales, d f16."""

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [..., n, 210] -> float32 [..., n*256]."""
        scale = half_at(data, 208) * data[..., 192:208].view(torch.int8).to(torch.float32)  # [..., n, 16]
        lead = data.shape[:-1]
        low = low_high_nibbles(data[..., :128], 64).reshape(*lead, 8, 32)
        place = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device).unsqueeze(-1)
        high = (data[..., 128:192].reshape(*lead, 2, 1, 32) >> place) & 3  # [..., n, 2, 4, 32]
        quants = (low | (high.flatten(-3, -2) << 4)).to(torch.float32) - 32.0
        return quants.reshape(*lead, 16, 16).mul_(scale.unsqueeze(-1)).flatten(-3)


def six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits: uint8 [..., 12] -> two float32 [..., 8].

    Bytes 0-3 and 4-7 hold the six bits of scales and minima 0-3; byte 8+i holds the low nibbles of scale and
    minimum 4+i, whose top two bits sit above the six bits of number i.
    """
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = torch.cat((first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    minimum = torch.cat((second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)), dim=-1)
    return scale.to(torch.float32), minimum.to(torch.float32)


Q4_K = OffsetSuperBlocks("Q4_K", 12, 256, 144, (0, 2), bits=4)
Q5_K = OffsetSuperBlocks("Q5_K", 13, 256, 176, (0, 2), bits=5)
Q6_K = SignedSuperBlocks("Q6_K", 14, 256, 210, (208,))
