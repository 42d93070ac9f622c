"""What a stored weight format is: a name, a block layout in bytes, and its decode in plain torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredFormat(ABC):
    """One block layout of the GGUF family: `block` values in `block_bytes` bytes, blocks along a row.

    name: the GGUF name, e.g. "Q4_K".  gguf_type: the type number in a GGUF tensor record.
    scales: byte offsets of the float16 scale fields in a block (empty where every value is its own scale).
    """

    name: str
    gguf_type: int
    block: int
    block_bytes: int
    scales: tuple[int, ...] = ()

    @abstractmethod
    def decode(self, data: Tensor) -> Tensor:
        """Blocks to values, newly allocated: uint8 [..., n, block_bytes] -> float32 [..., n * block]."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values; ValueError where a row would end inside a block."""
        if columns < 0 or columns % self.block:
            raise ValueError(
                f"{self.name}: a row of {columns} values is not a whole number of blocks of {self.block}"
            )
        return columns // self.block * self.block_bytes

    def decode_rows(self, data: Tensor, columns: int) -> Tensor:
        """Rows to values: uint8 [..., row_bytes(columns)] -> float32 [..., columns], a new tensor."""
        blocks = columns // self.block
        return self.decode(data.reshape(*data.shape[:-1], blocks, self.block_bytes))

    def finite(self, data: Tensor) -> bool:
        """Whether every scale in uint8 [rows, row_bytes] is finite, so that every decoded value is."""
        exponents = _halves(data.reshape(-1, self.block_bytes)).view(torch.int16)
        # all exponent bits set means NaN or infinity; isfinite on float16 would widen copies first
        return not any(bool((exponents[:, at // 2] & 0x7C00).eq(0x7C00).any()) for at in self.scales)


def half_at(data: Tensor, at: int) -> Tensor:
    """The float16 field at byte `at` of each block: uint8 [..., block_bytes] -> float32 [..., 1]."""
    return _halves(data)[..., at // 2 : at // 2 + 1].to(torch.float32)


def _halves(data: Tensor) -> Tensor:
    """The same bytes as float16; copied only where they start at an odd address or are strided."""
    whole = data.is_contiguous() and data.storage_offset() % 2 == 0
    return (data if whole else data.clone(memory_format=torch.contiguous_format)).view(torch.float16)


def low_high_nibbles(packed: Tensor, group: int) -> Tensor:
    """Split nibbles, low halves of a group first: uint8 [..., n*group] -> uint8 [..., n*2, group]."""
    grouped = packed.reshape(*packed.shape[:-1], packed.shape[-1] // group, 1, group)
    return torch.cat((grouped & 0x0F, grouped >> 4), dim=-2).flatten(-3, -2)
