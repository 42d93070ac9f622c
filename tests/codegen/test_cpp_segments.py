"""Loops in pieces: where indices wrap, what is left alone, and that the numbers stay."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Integer

from tests.codegen.cpp_cases import plan_of
from torchweld.codegen.cpp_segments import loop_in_pieces, piece_length
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Kernel, MatmulPart, RowPart, Store, size_symbol
from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.terms import Axis, Contract, Expr, Load, Ref

F32 = torch.float32


def _load(index: Expr) -> Load:
    return Load(F32, "x", (index,))


def _axis(extent: int | sympy.Symbol) -> Axis:
    return Axis("i", sympy.sympify(extent))


@pytest.mark.parametrize(("extent", "start", "divisor", "length"), [
    (64, 32, 64, 32),  # the other half of a head
    (576, 0, 64, 64),  # heads of 64
    (96, 16, 48, 16),
    (64, 0, 64, None),  # wraps at the end only
    (64, 3, 64, None),  # a piece of 3
    (64, 8, 64, None),  # shorter than a vector
    (4096, 0, 64, None),  # 64 pieces
    (2048, 0, 64, 64),
])  # fmt: skip
def test_pieces_end_where_an_index_wraps(extent: int, start: int, divisor: int, length: int | None) -> None:
    axis = _axis(extent)
    shifted = axis.symbol + start
    assert piece_length([_load(Mod(shifted, Integer(divisor)))], axis) == length
    assert piece_length([_load(2 * FloorDiv(shifted, Integer(divisor)) + 1)], axis) == length


def test_what_is_left_alone() -> None:
    axis, other = _axis(64), Axis("j", Integer(64))
    assert piece_length([_load(axis.symbol)], axis) is None, "nothing wraps"
    assert piece_length([_load(Mod(other.symbol + 32, Integer(64)))], axis) is None, "another axis"
    assert piece_length([_load(Mod(2 * axis.symbol, Integer(64)))], axis) is None, "not axis + constant"
    assert piece_length([_load(Mod(axis.symbol, size_symbol("S")))], axis) is None, "an unknown divisor"
    symbolic = _axis(size_symbol("S"))
    assert piece_length([_load(Mod(symbolic.symbol, Integer(64)))], symbolic) is None, "an unknown extent"


def test_pieces_hold_for_all_indices_of_a_loop() -> None:
    axis = _axis(192)
    terms = [_load(Mod(axis.symbol, Integer(64))), _load(Mod(axis.symbol + 32, Integer(64)))]
    assert piece_length(terms, axis) == 32
    lines = loop_in_pieces("i", 192, 32, ["y[i] = x[i];"])
    assert lines[:2] == ["#pragma GCC unroll 6", "for (int64_t i_first = 0; i_first < 192; i_first += 32) {"]


def test_wraps_are_written_as_those_of_a_piece() -> None:
    lines = ["y[i] = x[(i / 64) + (i % 64)] + z[(i % 48)] + w[(pi / 64)];"]
    inner = loop_in_pieces("i", 192, 32, lines)[-3]
    assert inner.strip() == "y[i] = x[(i_first / 64) + (i_first % 64 + i_lane)] + z[(i % 48)] + w[(pi / 64)];"


@settings(max_examples=4)
@given(
    heads=st.integers(1, 5), size=st.sampled_from([32, 48, 64]), shift=st.sampled_from([0, 16, 24, 32]),
    rows=st.integers(1, 4),
)  # fmt: skip
def test_a_row_part_reads_the_same_numbers(heads: int, size: int, shift: int, rows: int) -> None:
    """y[m, j] = x[m, j // size, (j + shift) % size]: a rotation inside every head."""
    m, j = Axis("m", size_symbol("M")), Axis("j", Integer(heads * size))
    place = (m.symbol, FloorDiv(j.symbol, Integer(size)), Mod(j.symbol + shift, Integer(size)))
    store = Store("y", (m.symbol, j.symbol), Load(F32, "x", place))
    x_shape = (size_symbol("M"), Integer(heads), Integer(size))
    buffers = (Buffer("x", F32, x_shape, "input"),
               Buffer("y", F32, (size_symbol("M"), Integer(heads * size)), "output"))  # fmt: skip
    executable = Executable(
        plan_of(Kernel("turn", buffers, ("M",), (RowPart((m,), (j,), (), (store,)),))), threads=1
    )
    if heads > 1 and shift in (0, 16) and size != 48:
        assert "#pragma GCC unroll" in executable.source.split('extern "C" void turn')[1]
    x = torch.randn(rows, heads, size)
    assert torch.equal(executable(x)[0], x.roll(-shift, -1).flatten(1))


def test_the_rows_of_a_matmul_are_read_head_by_head() -> None:
    heads, size, columns = 9, 64, 20
    m, n, k = Axis("m", size_symbol("M")), Axis("n", Integer(columns)), Axis("k", Integer(heads * size))
    head, lane = FloorDiv(k.symbol, Integer(size)), Mod(k.symbol, Integer(size))
    x = Load(F32, "x", (head, m.symbol, lane))
    contract = Contract(F32, k, x, Load(F32, "w", (n.symbol, k.symbol)))
    part = MatmulPart((), (m,), n, (), (Bind("acc", contract),),
                      (Store("y", (m.symbol, n.symbol), Ref(F32, "acc")),))  # fmt: skip
    buffers = (Buffer("x", F32, (Integer(heads), size_symbol("M"), Integer(size)), "input"),
               Buffer("w", F32, (Integer(columns), Integer(heads * size)), "weight"),
               Buffer("y", F32, (size_symbol("M"), Integer(columns)), "output"))  # fmt: skip
    executable = Executable(plan_of(Kernel("heads", buffers, ("M",), (part,))), threads=1)
    assert "#pragma GCC unroll 9" in executable.source
    values, weights = torch.randn(heads, 3, size), torch.randn(columns, heads * size)
    want = values.transpose(0, 1).flatten(1).double() @ weights.T.double()
    torch.testing.assert_close(executable(values, weights)[0].double(), want, rtol=1e-5, atol=1e-4)
