"""Packed weights: the layout keeps every value, is made once, is shared, and follows writes to the weight."""

from __future__ import annotations

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Integer
from torch import Tensor

from tests.codegen.cpp_cases import dequantized, plan_of, quantized, same_bits
from tests.codegen.test_cpp_formats import FORMATS, stored_matmul
from torchweld.codegen.cache import Cache
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Indirect, Kernel, MatmulPart, RowPart, Store, size_symbol
from torchweld.codegen.packed_plan import find_packings
from torchweld.codegen.packing import Packing, huge_pages, shared_packer
from torchweld.codegen.plan import Launch, Plan, ValueSpec
from torchweld.graph.formats import get_format
from torchweld.graph.terms import Axis, Contract, Decode, Load, Ref, axis_symbol

F32 = torch.float32
BLOCK = {"Q4_K": 256, "Q5_K": 256, "Q6_K": 256}


def weight(name: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A stored weight, uint8 [rows, row_bytes], and its values, float32 [rows, columns]."""
    data = quantized(name, rows, columns, seed)
    return data.view(torch.uint8).reshape(rows, -1), dequantized(name, data).reshape(rows, columns)


def with_constant(plan: Plan, **constants: Tensor) -> Plan:
    """`plan` with some of its inputs as constants."""
    inputs = tuple(spec for spec in plan.inputs if spec.name not in constants)
    return Plan(inputs, constants, plan.values, plan.steps, plan.outputs, plan.sizes)


def linear(name: str, data: Tensor, columns: int) -> Plan:
    """y = x @ decode(w).T with a constant w."""
    return with_constant(plan_of(stored_matmul(name, data.shape[0], columns, data.shape[1])), w=data)


def _lookup(name: str, rows: int, columns: int, row_bytes: int) -> Kernel:
    """e[b] = table[ids[b]]."""
    b, d = Axis("b", size_symbol("B")), Axis("d", Integer(columns))
    value = Decode(F32, name, "w", (axis_symbol("row"),), d.symbol)
    part = RowPart((b,), (d,), (), (Store("e", (b.symbol, d.symbol), value),))
    buffers = (Buffer("ids", torch.int64, (size_symbol("B"),), "input"),
               Buffer("w", torch.uint8, (Integer(rows), Integer(row_bytes)), "weight", name),
               Buffer("e", F32, (size_symbol("B"), Integer(columns)), "output"))  # fmt: skip
    ids = Load(torch.int64, "ids", (b.symbol,))
    return Kernel("lookup", buffers, ("B",), (part,), (Indirect("row", ids, Integer(rows)),))


def _tied(name: str, data: Tensor, columns: int) -> Plan:
    """e = w[ids], y = x @ w.T: an embedding that is the output head too."""
    lookup = _lookup(name, data.shape[0], columns, data.shape[1])
    head = stored_matmul(name, data.shape[0], columns, data.shape[1])
    specs = {b.name: ValueSpec(b.name, b.dtype, b.shape) for b in (*lookup.buffers, *head.buffers)}
    steps = (Launch(lookup, ("ids", "w", "e")), Launch(head, ("x", "w", "y")))
    outputs = {"e": specs["e"], "y": specs["y"]}
    return Plan((specs["ids"], specs["x"]), {"w": data}, outputs, steps, ("e", "y"), ("B", "M"))


@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_are_exact_and_invariant_to_rows(name: str) -> None:
    rows, columns = 115, 512
    data, values = weight(name, rows, columns)
    executable = Executable(_tied(name, data, columns), threads=2)
    assert "tw_packed_matmul" in executable.source and "tw_packed_at" in executable.source
    ids = torch.tensor([0, 5, rows - 1, 5, 16])
    eye = torch.eye(columns)
    embedded, many = executable(ids, eye)
    assert torch.equal(embedded, values[ids])
    assert torch.equal(many.T, values)
    for column in (0, 15, 33, 255, 511):
        one = executable(ids, eye[column : column + 1])[1]
        assert torch.equal(one[0], values[:, column]), column
    with pytest.raises(IndexError, match="lookup"):
        executable(torch.tensor([rows]), eye)
    x = torch.randn(70, columns)
    whole = executable(ids, x)[1]
    want = x.double() @ values.double().T
    assert float((whole.double() - want).abs().max() / want.abs().max()) < 2e-6
    for count in (*range(1, 18), 33, 64, 65):
        assert same_bits(executable(ids, x[:count])[1], whole[:count].contiguous()), count


@settings(max_examples=5)
@given(
    name=st.sampled_from(FORMATS),
    rows=st.integers(64, 150),
    blocks=st.integers(1, 3),
    count=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_packed_equals_stored(name: str, rows: int, blocks: int, count: int, seed: int) -> None:
    columns = blocks * BLOCK.get(name, 32)
    data, _ = weight(name, rows, columns, seed)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))
    plan = plan_of(stored_matmul(name, rows, columns, data.shape[1]))
    (stored,) = Executable(plan, threads=1)(x, data)
    (packed,) = Executable(with_constant(plan, w=data), threads=1)(x)
    scale = float(stored.abs().max()) if stored.numel() else 1.0
    torch.testing.assert_close(packed, stored, rtol=0, atol=4e-6 * max(scale, 1e-30))


def _part_of_weight(start: int, extent: int, row_bytes: int) -> Kernel:
    """y[m, n] = sum over k of x[m, k] * w[start + n, k], w of 128 rows."""
    m, n, k = Axis("m", size_symbol("M")), Axis("n", Integer(extent)), Axis("k", Integer(64))
    second = Decode(F32, "Q8_0", "w", (n.symbol + start,), k.symbol)
    contract = Contract(F32, k, Load(F32, "x", (m.symbol, k.symbol)), second)
    store = Store("y", (m.symbol, n.symbol), Ref(F32, "acc"))
    part = MatmulPart((), (m,), n, (), (Bind("acc", contract),), (store,))
    buffers = (Buffer("x", F32, (size_symbol("M"), Integer(64)), "input"),
               Buffer("w", torch.uint8, (Integer(128), Integer(row_bytes)), "weight", "Q8_0"),
               Buffer("y", F32, (size_symbol("M"), Integer(extent)), "output"))  # fmt: skip
    return Kernel("part", buffers, ("M",), (part,))


@pytest.mark.parametrize(("start", "packed"), [(32, True), (8, False)])
def test_a_slice_of_rows_is_packed_where_it_starts_with_a_group(start: int, packed: bool) -> None:
    data, values = weight("Q8_0", 128, 64)
    plan = with_constant(plan_of(_part_of_weight(start, 50, data.shape[1])), w=data)
    assert ("w" in find_packings(plan)) == packed
    x = torch.randn(3, 64)
    (y,) = Executable(plan, threads=1)(x)
    torch.testing.assert_close(y, x @ values[start : start + 50].T, rtol=1e-5, atol=1e-5)


def test_what_others_want_stored_is_not_packed() -> None:
    data, _ = weight("Q8_0", 64, 64)
    plan = linear("Q8_0", data, 64)
    assert list(find_packings(plan)) == ["w"]
    returned = Plan(plan.inputs, plan.constants, plan.values, plan.steps, ("y", "w"), plan.sizes)
    assert find_packings(returned) == {}
    small, _ = weight("Q8_0", 48, 64)
    assert find_packings(linear("Q8_0", small, 64)) == {}


def test_a_weight_is_packed_once_and_freed_with_its_last_user() -> None:
    data, _ = weight("Q8_0", 80, 64)
    first = Executable(linear("Q8_0", data, 64), threads=1)
    second = Executable(linear("Q8_0", data, 64), threads=1)
    packed = first._packed.data["w"]
    assert packed.data_ptr() == second._packed.data["w"].data_ptr()
    gone = weakref.ref(packed)
    del first, second, packed
    gc.collect()
    assert gone() is None, "the stored weight still lives, the packed one should not"
    third = Executable(linear("Q8_0", data, 64), threads=1)
    assert third(torch.eye(64))[0].any()


def test_other_tensors_of_its_memory_share_a_packed_weight_while_nobody_writes() -> None:
    data, _ = weight("Q8_0", 80, 64)
    other, values = weight("Q8_0", 80, 64, seed=1)
    independent = data.data
    first = Executable(linear("Q8_0", data, 64), threads=1)
    for tensor, shared in ((data.detach(), True), (independent, True), (data[:64], False)):
        executable = Executable(linear("Q8_0", tensor, 64), threads=1)
        assert (executable._packed.data["w"] is first._packed.data["w"]) == shared
    independent.copy_(other)  # first does not see it: the tensor that it read counts other writes
    again = Executable(linear("Q8_0", independent, 64), threads=1)
    assert torch.equal(again(torch.eye(64))[0].T, values)


@pytest.mark.parametrize("counted_together", [False, True])
def test_a_write_to_the_weight_is_seen(counted_together: bool) -> None:
    data, _ = weight("Q8_0", 80, 64)
    other, values = weight("Q8_0", 80, 64, seed=1)
    if counted_together:
        tied = torch.zeros(1)
        shared = tied.detach()
        shared.data = data
        data = shared.view(data.shape)
    executable = Executable(linear("Q8_0", data, 64), threads=1)
    x = torch.eye(64)
    before = executable(x)[0]
    data.copy_(other)
    after = executable(x)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after.T, values)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_bytes_are_about_the_stored_bytes(name: str) -> None:
    data, _ = weight(name, 128, 1024)
    packer = shared_packer(Cache())
    assert data.numel() <= packer.nbytes(Packing(data, name)) <= 1.03 * data.numel()
    assert get_format(name).row_bytes(1024) == data.shape[1]


@pytest.mark.parametrize("nbytes", [0, 1, 1000, (2 << 20) - 1, 2 << 20, (4 << 20) + 5])
def test_memory_of_huge_pages_is_zeroed_and_aligned(nbytes: int) -> None:
    room = huge_pages(nbytes)
    assert room.shape == (nbytes,) and not room.any()
    assert room.data_ptr() % (64 if nbytes < 2 << 20 else 2 << 20) == 0 or nbytes == 0
    room.fill_(7)
    assert int(room.sum(dtype=torch.int64)) == 7 * nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak that Linux keeps")
def test_a_file_and_its_packed_form_are_not_in_memory_at_once(tmp_path: Path) -> None:
    """The peak of packing is the packed form and little else, because the file's pages go as they are read."""
    rows, columns = 24576, 2048
    row_bytes = columns // 32 * 34
    path = tmp_path / "weights"
    path.write_bytes(bytes(rows * row_bytes))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    packing = Packing(torch.frombuffer(mapped, dtype=torch.uint8).view(rows, row_bytes), "Q8_0")
    packer = shared_packer(Cache())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    (packed,) = packer.pack([packing], 2)
    assert packed.numel() >= rows * row_bytes
    assert memory("VmHWM") - before < 1.6 * rows * row_bytes


def memory(field: str) -> int:
    """Bytes, of a field of this process's status."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024
