"""Products with packed weights in bfloat16 and int8: within the stated error; rows do not influence each other."""

from __future__ import annotations

import functools
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Integer
from torch import Tensor

import torchweld.codegen.executable as executable_module
from tests.codegen.cpp_cases import plan_of, same_bits
from tests.codegen.test_packing import linear, weight, with_constant
from torchweld.codegen.cpp import FLAGS
from torchweld.codegen.cpp_packed import FEW_ROWS, Precision, narrow_rows
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Kernel, MatmulPart, Store, size_symbol
from torchweld.codegen.packed_plan import find_packings
from torchweld.codegen.plan import Plan
from torchweld.graph.terms import Axis, Contract, Load, Ref, cast

DENSE = ("F32", "F16", "BF16")
CASES: list[tuple[str, Precision]] = [
    *((name, "int8") for name in ("Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "BF16")),
    *((name, "bf16") for name in ("Q8_0", "Q5_0", "Q5_K", "F32")),
]  # fmt: skip
MANY = (17, 31, 32, 33, 64, 65, 257)


def rounding_bound(x: Tensor, values: Tensor) -> Tensor:
    """Of a sum of products in float32: float64 [rows, columns]."""
    return (x.double().abs() @ values.double().abs().T) * 2e-6


def bf16_bound(x: Tensor, values: Tensor) -> Tensor:
    """Both factors of a product are off by at most 2^-9 of themselves."""
    return (x.double().abs() @ values.double().abs().T) * 2**-8 * 1.01


def int8_bound(x: Tensor, values: Tensor) -> Tensor:
    """A number is off by at most half a step, and 127 steps are the greatest of its 32."""
    step = x.double().unflatten(-1, (-1, 32)).abs().amax(-1) / 127
    per_block = values.double().abs().unflatten(-1, (-1, 32)).sum(-1)
    return step / 2 @ per_block.T * 1.0001


def check(executable: Executable, x: Tensor, values: Tensor, bound: Tensor) -> None:
    """Every element is within its own bound."""
    (got,) = executable(x)
    error = (got.double() - x.double() @ values.double().T).abs()
    assert bool((error <= bound + rounding_bound(x, values) + 1e-30).all())


@functools.cache
def built(name: str, precision: Precision) -> tuple[Executable, Tensor]:
    """A linear layer of 131 rows of 768, and its weights."""
    data, values = weight(name, 131, 768)
    return Executable(linear(name, data, 768), threads=2, precision=precision), values


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_error_is_within_the_stated_bound_and_rows_do_not_matter(name: str, precision: Precision) -> None:
    executable, values = built(name, precision)
    x = torch.randn(300, 768, generator=torch.Generator().manual_seed(3))
    few = x[:FEW_ROWS]
    exact = precision == "bf16" and name not in DENSE
    bound = bf16_bound if name in DENSE else int8_bound
    check(executable, few, values, torch.zeros(()) if exact else bound(few, values))
    # more rows: bfloat16, or where the CPU has no such products what the few rows use
    check(executable, x, values, torch.maximum(bf16_bound(x, values), int8_bound(x, values)))
    whole = executable(few)[0]
    for count in range(1, FEW_ROWS):
        assert same_bits(executable(x[:count])[0], whole[:count].contiguous()), count
    whole = executable(x)[0]
    for count in MANY:
        assert same_bits(executable(x[:count])[0], whole[:count].contiguous()), count


@given(case=st.sampled_from(CASES), count=st.integers(0, 70), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
def test_any_rows_of_any_size(case: tuple[str, Precision], count: int, scale: float) -> None:
    executable, values = built(*case)
    x = torch.randn(count, 768, generator=torch.Generator().manual_seed(count)) * scale
    check(executable, x, values, torch.maximum(bf16_bound(x, values), int8_bound(x, values)))


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_zeros_and_what_is_not_finite(precision: Precision, count: int) -> None:
    data, values = weight("Q8_0", 80, 96)
    executable = Executable(linear("Q8_0", data, 96), threads=1, precision=precision)
    x = torch.zeros(count, 96)
    assert not executable(x)[0].any()
    x[0, 40] = torch.nan
    got = executable(x)[0]
    assert got[0].isnan().all() and not got[1:].any()
    x[0, 40] = torch.inf
    seen = values[:, 40] != 0
    assert not executable(x)[0][0][seen].isfinite().any()


def test_blocks_of_rows_in_bfloat16_fit_the_cache() -> None:
    assert [narrow_rows(width) for width in (32, 640, 2048, 8192, 1 << 20)] == [256, 256, 256, 64, 32]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names flags of x86 compilers")
@pytest.mark.parametrize(("flag", "precision"), [
    ("-mno-avx512f", "f32"),  # AVX2
    ("-march=x86-64-v2", "f32"),  # no fma, no float16 instructions
    ("-mno-amx-tile", "bf16"),  # vdpbf16ps where there is AVX-512
    ("-mno-avx512bf16", "int8"),  # many rows in int8 too
])  # fmt: skip
def test_other_instruction_sets(flag: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that this CPU would not take: they compile, keep to the bound, and rows do not matter."""
    monkeypatch.setattr(executable_module, "FLAGS", (*FLAGS, flag))
    for name in ("Q8_0", "Q5_K"):
        data, values = weight(name, 115, 256)
        executable = Executable(linear(name, data, 256), threads=1, precision=precision)
        x = torch.randn(37, 256, generator=torch.Generator().manual_seed(0))
        worst = torch.maximum(bf16_bound(x, values), int8_bound(x, values))
        check(executable, x, values, torch.zeros(()) if precision == "f32" else worst)
        whole = executable(x[:FEW_ROWS])[0]
        for count in (1, 2, 3, 8, 9):
            assert same_bits(executable(x[:count])[0], whole[:count].contiguous()), count
        assert torch.equal(executable(torch.eye(256))[0].T, values) or precision != "f32"


def plain_linear(values: Tensor) -> Plan:
    """y = x @ w.T with a constant w of plain numbers."""
    rows, columns = values.shape
    m, n, k = Axis("m", size_symbol("M")), Axis("n", Integer(rows)), Axis("k", Integer(columns))
    x, w = Load(torch.float32, "x", (m.symbol, k.symbol)), Load(values.dtype, "w", (n.symbol, k.symbol))
    store = Store("y", (m.symbol, n.symbol), Ref(torch.float32, "acc"))
    contract = Contract(torch.float32, k, x, cast(w, torch.float32))
    part = MatmulPart((), (m,), n, (), (Bind("acc", contract),), (store,))
    buffers = (Buffer("x", torch.float32, (size_symbol("M"), Integer(columns)), "input"),
               Buffer("w", values.dtype, (Integer(rows), Integer(columns)), "weight"),
               Buffer("y", torch.float32, (size_symbol("M"), Integer(rows)), "output"))  # fmt: skip
    plan = plan_of(Kernel("plain", buffers, ("M",), (part,)))
    return with_constant(plan, w=values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_weights_are_kept_in_bfloat16(dtype: torch.dtype) -> None:
    values = torch.randn(70, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = plain_linear(values)
    executable = Executable(plan, threads=2, precision="bf16")
    assert "tw_R16_BF16" in executable.source
    x = torch.randn(40, 100, generator=torch.Generator().manual_seed(2))
    for count in (40, FEW_ROWS, 1):
        check(executable, x[:count], values, bf16_bound(x[:count], values.float()))
    eye = torch.eye(100)
    assert torch.equal(executable(eye)[0].T, values.to(torch.bfloat16).float())
    whole = executable(x[:FEW_ROWS])[0]
    for count in range(1, FEW_ROWS):
        assert same_bits(executable(x[:count])[0], whole[:count].contiguous()), count


@functools.cache
def plain(dtype: torch.dtype, rows: int, columns: int, seed: int) -> tuple[Executable, Tensor]:
    """A linear layer of plain numbers in f32, and its weights."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    plan = plain_linear(values)
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert find_packings(plan)["w"].format == name, "f32 means the numbers of the model"
    return Executable(plan, threads=2), values


@settings(max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rows=st.integers(64, 150), columns=st.integers(1, 200), seed=st.integers(0, 3), data=st.data(),
)  # fmt: skip
def test_plain_weights_are_exact_in_f32(
    dtype: torch.dtype, rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    executable, values = plain(dtype, rows, columns, seed)
    x = torch.randn(70, columns, generator=torch.Generator().manual_seed(seed))
    check(executable, x, values, torch.zeros(()))
    assert torch.equal(executable(torch.eye(columns))[0].T, values.float())
    whole = executable(x)[0]
    for count in (1, data.draw(st.integers(2, 8)), 9, 16, data.draw(st.integers(17, 69))):
        assert same_bits(executable(x[:count])[0], whole[:count].contiguous()), count
