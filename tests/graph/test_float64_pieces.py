"""Linears in pieces give what the whole weight gives, and never hold the whole weight."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchweld.graph import float64_pieces
from torchweld.graph.capture import capture
from torchweld.graph.float64 import reference_float64
from torchweld.graph.float64_pieces import Float64PieceInterpreter, _Stored
from torchweld.graph.ops.dequantize import dequantize
from torchweld.graph.program import Program


class Model(nn.Module):
    """A stored weight, a plain one with a bias, and a weight that is read in another way as well."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rows)
        scales = torch.rand(rows, columns // 32, 1, generator=generator).half().view(torch.uint8)
        codes = torch.randint(0, 256, (rows, columns // 32, 32), generator=generator, dtype=torch.uint8)
        self.register_buffer("stored", torch.cat([scales, codes], -1).reshape(rows, -1))
        self.register_buffer("plain", torch.randn(columns, rows, generator=generator))
        self.register_buffer("bias", torch.randn(columns, generator=generator))
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        tensors: dict[str, Any] = dict(self.named_buffers())
        y = F.linear(x, dequantize(tensors["stored"], "Q8_0", self.columns))
        z = F.linear(y, tensors["plain"], tensors["bias"])
        result: Tensor = F.linear(z, tensors["bias"][None].expand(3, -1)) + tensors["bias"].sum()
        return result


@cache
def captured(columns: int, rows: int) -> Program:
    return capture(Model(columns, rows), (torch.randn(2, 5, columns),))


@given(
    sizes=st.sampled_from([(32, 2), (64, 9), (96, 5)]), batch=st.integers(2, 4), pieces=st.integers(1, 300)
)
def test_equals_the_whole(sizes: tuple[int, int], batch: int, pieces: int) -> None:
    x = torch.randn(batch, 5, sizes[0])
    program = captured(*sizes)
    (want,) = reference_float64(program.graph_module, (x,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float64_pieces, "PIECE_ELEMENTS", pieces)
        (got,) = reference_float64(program.graph_module, (x,), Float64PieceInterpreter)
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12 * want.abs().max().item())


def test_a_weight_is_decoded_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, program = torch.randn(2, 5, 64), captured(64, 9)
    decoded: list[tuple[int, int]] = []
    whole = _Stored.rows

    def rows(self: _Stored, start: int, end: int) -> Tensor:
        decoded.append((start, end))
        return whole(self, start, end)

    monkeypatch.setattr(_Stored, "rows", rows)
    monkeypatch.setattr(float64_pieces, "PIECE_ELEMENTS", 4 * 64)
    reference_float64(program.graph_module, (x,), Float64PieceInterpreter)
    assert decoded == [(0, 4), (4, 8), (8, 9)]
