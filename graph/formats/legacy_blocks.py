"""Blocks of 32 values with one float16 scale (and minimum): Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

Formula: value = d * q (symmetric) or d * q + m (with a minimum). Nibbles: byte i of the 16 holds value i (low
half) and value i + 16 (high half); a fifth bit, where there is one, is bit i of a little-endian uint32.
Source: ggml-quants.c (dequantize_row_*); every bit checked against gguf.quants in tests/formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.graph.formats.base import StoredFormat, half_at, low_high_nibbles


@dataclass(frozen=True)
class Int8Blocks(StoredFormat):
    """Q8_0: d f16, 32 int8. value = d * q."""

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [..., n, 34] -> float32 [..., n*32]."""
        quants = data[..., 2:].view(torch.int8).to(torch.float32)
        return quants.mul_(half_at(data, 0)).flatten(-2)


@dataclass(frozen=True)
class SymmetricBlocks(StoredFormat):
    """Q4_0, Q5_0: d f16, (Q5_0) 4 bytes of fifth bits, 16 bytes of nibbles. value = d * (q - 2^(bits-1))."""

    bits: int = 4

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [..., n, block_bytes] -> float32 [..., n*32]."""
        quants = unpack(data[..., 2:], self.bits) - float(1 << (self.bits - 1))
        return quants.mul_(half_at(data, 0)).flatten(-2)


@dataclass(frozen=True)
class OffsetBlocks(StoredFormat):
    """Q4_1, Q5_1: d f16, m f16, (Q5_1) 4 bytes of fifth bits, 16 bytes of nibbles. value = d * q + m."""

    bits: int = 4

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [..., n, block_bytes] -> float32 [..., n*32]; product and sum are each rounded."""
        quants = unpack(data[..., 4:], self.bits)
        return quants.mul_(half_at(data, 0)).add_(half_at(data, 2)).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """4 or 5 bits per value, the fifth bits first: uint8 [..., 16 or 20] -> float32 [..., 32]."""
    nibbles = low_high_nibbles(packed[..., -16:], 16).flatten(-2)
    if bits == 4:
        return nibbles.to(torch.float32)
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    fifth = ((packed[..., :4, None] >> place) & 1).flatten(-2)
    return (nibbles | (fifth << 4)).to(torch.float32)


Q8_0 = Int8Blocks("Q8_0", 8, 32, 34, (0,))
Q4_0 = SymmetricBlocks("Q4_0", 2, 32, 18, (0,), bits=4)
Q5_0 = SymmetricBlocks("Q5_0", 6, 32, 22, (0,), bits=5)
Q4_1 = OffsetBlocks("Q4_1", 3, 32, 20, (0, 2), bits=4)
Q5_1 = OffsetBlocks("Q5_1", 7, 32, 24, (0, 2), bits=5)
