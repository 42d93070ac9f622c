"""Dense formats: F32, F16 and BF16, one value per "block"; decoding widens, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.graph.formats.base import StoredFormat


@dataclass(frozen=True)
class DenseFormat(StoredFormat):
    """Little-endian values of one floating dtype, one after the other."""

    dtype: torch.dtype = torch.float32

    def decode(self, data: Tensor) -> Tensor:
        """uint8 [..., n, block_bytes] -> float32 [..., n]; a copy, as an op may not return its input."""
        # clone before the view: the bytes may start at an address or a stride that the wider dtype refuses
        values = data.clone(memory_format=torch.contiguous_format).view(self.dtype).squeeze(-1)
        return values.to(torch.float32)

    def finite(self, data: Tensor) -> bool:
        """Whether every stored value of uint8 [rows, row_bytes] is finite."""
        return bool(self.decode(data.reshape(-1, self.block_bytes)).isfinite().all())


F32 = DenseFormat("F32", 0, 1, 4, dtype=torch.float32)
F16 = DenseFormat("F16", 1, 1, 2, dtype=torch.float16)
BF16 = DenseFormat("BF16", 30, 1, 2, dtype=torch.bfloat16)
