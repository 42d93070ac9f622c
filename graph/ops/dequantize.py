"""torchweld::dequantize: rows of stored weight blocks to float32 values.

formula:  the decode of `torchweld.graph.formats`, which is the GGUF layout, bit for bit
shapes:   data uint8 [..., row_bytes], row_bytes = format.row_bytes(columns) -> float32 [..., columns]
source:   ggml-quants.c; gguf.quants is the reference in tests/formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchweld.graph.formats import get_format

_SCHEMA = "(Tensor data, str format, int columns) -> Tensor"


def _check(data: Tensor, format: str, columns: int) -> None:
    """Raise ValueError naming the argument that breaks the contract of the module docstring."""
    expected = get_format(format).row_bytes(columns)
    if data.dtype != torch.uint8 or data.dim() == 0:
        raise ValueError(f"torchweld::dequantize: expected uint8 rows, got {data.dtype} of rank {data.dim()}")
    if data.shape[-1] != expected:
        raise ValueError(
            f"torchweld::dequantize: a row of {columns} values of {format} is {expected} bytes, "
            f"got {data.shape[-1]}"
        )


@torch.library.custom_op("torchweld::dequantize", mutates_args=(), schema=_SCHEMA)
def dequantize(data: Tensor, format: str, columns: int) -> Tensor:
    """Decode stored rows: uint8 [..., row_bytes] -> float32 [..., columns].

    Raises ValueError for an unknown format, a row that is no whole number of blocks, or a wrong row length.
    """
    _check(data, format, columns)
    return get_format(format).decode_rows(data, columns)


@dequantize.register_fake
def _(data: Tensor, format: str, columns: int) -> Tensor:
    _check(data, format, columns)
    return data.new_empty((*data.shape[:-1], columns), dtype=torch.float32)
