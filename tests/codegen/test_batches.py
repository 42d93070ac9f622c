"""A batch in pieces: found only where its elements do not meet, the same bits as whole, wrong indices still named."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Expr, Integer
from torch import Tensor

from tests.codegen.cpp_cases import plan_of, same_bits
from tests.codegen.test_packing import with_constant
from torchweld.codegen.batches import BatchSplitter, choose_piece, find_batch, has_batch
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Indirect, Kernel, MatmulPart, RowPart, Store, size_symbol
from torchweld.codegen.plan import Launch, Plan, SizeTable, ValueSpec
from torchweld.graph.terms import (
    Axis,
    Contract,
    IndexValue,
    Load,
    Ref,
    Term,
    axis_symbol,
    cast,
    op,
)

F32 = torch.float32
B, S = size_symbol("B"), size_symbol("S")
D, ROWS = 64, 80


def _buffer(name: str, *shape: Expr | int, role: str = "input", dtype: torch.dtype = F32) -> Buffer:
    return Buffer(name, dtype, tuple(Integer(x) if isinstance(x, int) else x for x in shape), role)  # type: ignore[arg-type]


def _linear(index: tuple[Expr, ...] | None = None, extra: Term | None = None) -> Kernel:
    """y[b, s, n] = sum over k of x[b, s, k] * w[n, k] (+ extra)."""
    b, s, n, k = Axis("b", B), Axis("s", S), Axis("n", Integer(ROWS)), Axis("k", Integer(D))
    x = Load(F32, "x", index or (b.symbol, s.symbol, k.symbol))
    contract = Contract(F32, k, x, Load(F32, "w", (n.symbol, k.symbol)))
    value: Term = Ref(F32, "acc")
    value = value if extra is None else op("add", value, extra)
    store = Store("y", (b.symbol, s.symbol, n.symbol), value)
    part = MatmulPart((), (b, s), n, (), (Bind("acc", contract),), (store,))
    buffers = (_buffer("x", B, S, D), _buffer("w", ROWS, D, role="weight"), _buffer("t", ROWS, ROWS),
               _buffer("y", B, S, ROWS, role="output"))  # fmt: skip
    return Kernel("linear", buffers, ("B", "S"), (part,))


def _lookup() -> Kernel:
    """z[b, s, n] = y[b, s, n] + t[ids[b, s], n]."""
    b, s, n = Axis("b", B), Axis("s", S), Axis("n", Integer(ROWS))
    at = (b.symbol, s.symbol, n.symbol)
    value = op("add", Load(F32, "y", at), Load(F32, "t", (axis_symbol("row"), n.symbol)))
    part = RowPart((b, s), (n,), (), (Store("z", at, value),))
    ids = Load(torch.int64, "ids", (b.symbol, s.symbol))
    buffers = (_buffer("ids", B, S, dtype=torch.int64), _buffer("y", B, S, ROWS), _buffer("t", ROWS, ROWS),
               _buffer("z", B, S, ROWS, role="output"))  # fmt: skip
    return Kernel("lookup", buffers, ("B", "S"), (part,), (Indirect("row", ids, Integer(ROWS)),))


def _model() -> tuple[Plan, Tensor, Tensor]:
    """Both kernels, one after the other, and the constants w and t."""
    generator = torch.Generator().manual_seed(0)
    w, t = torch.randn(ROWS, D, generator=generator), torch.randn(ROWS, ROWS, generator=generator)
    linear, lookup = _linear(), _lookup()
    specs = {b.name: ValueSpec(b.name, b.dtype, b.shape) for b in (*linear.buffers, *lookup.buffers)}
    steps = (Launch(linear, ("x", "w", "t", "y")), Launch(lookup, ("ids", "y", "t", "z")))
    values = {name: specs[name] for name in ("y", "z")}
    return Plan((specs["x"], specs["ids"]), {"w": w, "t": t}, values, steps, ("z",), ("B", "S")), w, t


@functools.cache
def _built(threads: int) -> Executable:
    return Executable(_model()[0], threads=threads)


def _plan(kernel: Kernel) -> Plan:
    return with_constant(plan_of(kernel), w=torch.zeros(ROWS, D), t=torch.zeros(ROWS, ROWS))


def test_a_batch_is_found() -> None:
    assert find_batch(_model()[0]) == "B"
    assert find_batch(_plan(_linear())) == "B"


b, s, n, k = (axis_symbol(name) for name in "bsnk")


@pytest.mark.parametrize("kernel", [
    _linear((B - 1 - b, s, k)),  # reads another element
    _linear((b, b, k)),  # the batch in another index
    _linear((b, B - 1, k)),
    _linear((Integer(0), s, k)),  # all read the first
    _linear(extra=cast(IndexValue(torch.int64, b), F32)),  # the number of the element
    _linear(extra=cast(IndexValue(torch.int64, B), F32)),  # how many there are
    _linear(extra=Load(F32, "t", (b, n))),  # a row of what all share
    replace(_linear(), buffers=(*_linear().buffers[:3], _buffer("y", S, B, ROWS, role="output"))),
])  # fmt: skip
def test_elements_that_meet_are_no_batch(kernel: Kernel) -> None:
    assert find_batch(_plan(kernel)) is None


def test_what_no_piece_may_do_alone_is_no_batch() -> None:
    plan = _model()[0]
    assert find_batch(replace(plan, in_place={"y": "x"})) is None
    assert find_batch(replace(plan, outputs=("z", "w"))) is None
    assert find_batch(replace(plan, steps=())) is None
    assert has_batch((B, S), "B") is True and has_batch((S,), "B") is False
    assert (
        has_batch((S, B), "B") is None and has_batch((2 * B,), "B") is None and has_batch((B, B), "B") is None
    )


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 12), length=st.integers(1, 40), threads=st.sampled_from([1, 2, 3]))
def test_pieces_change_no_bit(batch: int, length: int, threads: int) -> None:
    (_, w, t), executable = _model(), _built(threads)
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, length, D, generator=generator)
    ids = torch.randint(ROWS, (batch, length), generator=generator)
    (z,) = executable(x, ids)
    torch.testing.assert_close(z, x @ w.T + t[ids], rtol=1e-4, atol=1e-4)
    for at in range(batch):
        assert same_bits(executable(x[at : at + 1], ids[at : at + 1])[0], z[at : at + 1].contiguous()), at
    assert same_bits(executable(x, ids)[0], z)


def test_a_wrong_index_in_any_piece_is_named() -> None:
    executable = Executable(_model()[0], threads=2)
    x, ids = torch.zeros(7, 40, D), torch.zeros(7, 40, dtype=torch.int64)
    executable(x, ids)
    assert executable._placed is not None and executable._placed.pieces is not None
    for at in (0, 6):
        wrong = ids.clone()
        wrong[at, 3] = ROWS
        with pytest.raises(IndexError, match="lookup"):
            executable(x, wrong)
    executable(x, ids)


def test_how_a_batch_is_cut() -> None:
    assert choose_piece(8, 2, lambda count: count << 10) == 4
    assert choose_piece(32, 2, lambda count: count << 20) == 2
    assert choose_piece(32, 2, lambda count: count << 30) == 1
    splitter = BatchSplitter(_model()[0], threads=2, few=16)

    def cut(batch: int, length: int) -> tuple[int, int, int] | None:
        found = splitter.split(SizeTable({"B": batch, "S": length}), lambda sizes: 0)
        return found and (found.count, found.table.sizes["B"], found.last.sizes["B"])

    assert cut(8, 20) == (2, 4, 4)
    assert cut(9, 20) == (2, 5, 4)
    assert cut(1, 20) is None, "nothing to cut"
    assert cut(3, 20) is None, "one thread would wait for a third of the time"
    assert cut(4, 8) is None, "16 rows have another arithmetic than 32"
    assert cut(2, 8) == (2, 1, 1)
