"""Stored weight formats in C++: one value, whole rows, few rows and many rows, against gguf's reader."""

from __future__ import annotations

import pytest
import torch
from sympy import Integer
from torch import Tensor

from tests.codegen.cpp_cases import dequantized, plan_of, quantized, run, same_bits
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Indirect, Kernel, MatmulPart, RowPart, Store, size_symbol
from torchweld.graph.terms import Axis, Contract, Decode, Load, Ref, axis_symbol

F32 = torch.float32
FORMATS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"]
ROWS, COLUMNS = 37, 512


def _data(name: str) -> tuple[Tensor, Tensor]:
    data = quantized(name, ROWS, COLUMNS)
    return data, dequantized(name, data).reshape(ROWS, COLUMNS)


def _lookup(name: str, row_bytes: int) -> Kernel:
    """y[b] = table[ids[b]]."""
    b, d = Axis("b", size_symbol("B")), Axis("d", Integer(COLUMNS))
    value = Decode(F32, name, "table", (axis_symbol("row"),), d.symbol)
    part = RowPart((b,), (d,), (), (Store("y", (b.symbol, d.symbol), value),))
    ids = Load(torch.int64, "ids", (b.symbol,))
    buffers = (Buffer("ids", torch.int64, (size_symbol("B"),), "input"),
               Buffer("table", torch.uint8, (Integer(ROWS), Integer(row_bytes)), "weight", name),
               Buffer("y", F32, (size_symbol("B"), Integer(COLUMNS)), "output"))  # fmt: skip
    return Kernel("lookup", buffers, ("B",), (part,), (Indirect("row", ids, Integer(ROWS)),))


def stored_matmul(name: str, rows: int, columns: int, row_bytes: int) -> Kernel:
    """y[m, n] = sum over k of x[m, k] * decode(w[n])[k]."""
    m, n, k = Axis("m", size_symbol("M")), Axis("n", Integer(rows)), Axis("k", Integer(columns))
    contract = Contract(
        F32, k, Load(F32, "x", (m.symbol, k.symbol)), Decode(F32, name, "w", (n.symbol,), k.symbol)
    )
    part = MatmulPart(
        (), (m,), n, (), (Bind("acc", contract),), (Store("y", (m.symbol, n.symbol), Ref(F32, "acc")),)
    )
    buffers = (Buffer("x", F32, (size_symbol("M"), Integer(columns)), "input"),
               Buffer("w", torch.uint8, (Integer(rows), Integer(row_bytes)), "weight", name),
               Buffer("y", F32, (size_symbol("M"), Integer(rows)), "output"))  # fmt: skip
    return Kernel(f"linear_{name.lower()}", buffers, ("M",), (part,))


@pytest.mark.parametrize("name", FORMATS)
def test_single_values_are_exact(name: str) -> None:
    data, values = _data(name)
    ids = torch.tensor([0, 5, 36, 5])
    got = run(_lookup(name, data.shape[1]), {"ids": ids, "table": data})["y"]
    assert same_bits(got + 0.0, values[ids] + 0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_blocks_are_exact(name: str) -> None:
    """Rows of the identity pick single weights: every place of every block, through both ways of reading."""
    data, values = _data(name)
    executable = Executable(plan_of(stored_matmul(name, ROWS, COLUMNS, data.shape[1])), threads=2)
    eye = torch.eye(COLUMNS)
    (many,) = executable(eye, data)
    assert torch.equal(many.T, values)
    for row in (0, 15, 16, 33, 255, 256, 511):
        (one,) = executable(eye[row : row + 1], data)
        assert torch.equal(one[0], values[:, row]), row


@pytest.mark.parametrize("name", FORMATS)
def test_linear_and_row_invariance(name: str) -> None:
    data, values = _data(name)
    executable = Executable(plan_of(stored_matmul(name, ROWS, COLUMNS, data.shape[1])), threads=2)
    x = torch.randn(70, COLUMNS)
    (whole,) = executable(x, data)
    want = x.double() @ values.double().T
    torch.testing.assert_close(
        whole.double(), want, rtol=1e-5, atol=1e-5 * float(values.abs().max()) * COLUMNS**0.5
    )
    for rows in (*range(1, 17), 33, 64, 65):
        assert same_bits(executable(x[:rows], data)[0], whole[:rows].contiguous()), rows
