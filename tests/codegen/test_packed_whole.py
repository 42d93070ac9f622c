"""Plain weights in int8 with one scale per row: the stated error, and the same bits on every path and for any rows."""

from __future__ import annotations

import functools
import platform

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torchweld.codegen.executable as executable_module
from tests.codegen.cpp_cases import same_bits
from tests.codegen.test_cpp_packed import check, plain_linear
from torchweld.codegen.cpp import FLAGS
from torchweld.codegen.executable import Executable
from torchweld.codegen.packed_plan import find_packings
from torchweld.codegen.packing import WHOLE, WHOLE_MOST_COLUMNS

SHAPES = [(131, 768), (70, 100), (64, 33)]


def int8_bound(x: Tensor, values: Tensor) -> Tensor:
    """Both factors are off by at most half of their row's scale."""
    zero = torch.zeros(len(x), 1)
    a = torch.cat([x, zero], -1).amax(-1, keepdim=True) - torch.cat([x, zero], -1).amin(-1, keepdim=True)
    a, b = a.double() / 510 * 1.001, values.double().abs().amax(-1) / 254 * 1.001
    x, values = x.double().abs(), values.double().abs()
    return a * values.sum(-1) + b * x.sum(-1, keepdim=True) + a * b * x.shape[-1]


@functools.cache
def built(rows: int, columns: int) -> tuple[Executable, Tensor]:
    """A linear layer of plain numbers in int8, and its weights."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return Executable(plain_linear(values), threads=2, precision="int8"), values


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_error_is_within_the_stated_bound_and_rows_do_not_matter(rows: int, columns: int) -> None:
    executable, values = built(rows, columns)
    assert "tw_packed_whole(" in executable.source.split("MatmulPart")[1]
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(3))
    check(executable, x, values, int8_bound(x, values))
    whole = executable(x)[0]
    for count in (*range(1, 18), 31, 32, 33, 48, 49, 257):
        assert same_bits(executable(x[:count])[0], whole[:count].contiguous()), count


@given(
    shape=st.sampled_from(SHAPES), count=st.integers(0, 70), shift=st.sampled_from([-3.0, 0.0, 0.5]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_any_rows_of_any_size(shape: tuple[int, int], count: int, shift: float, scale: float) -> None:
    executable, values = built(*shape)
    x = (torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count)) + shift) * scale
    check(executable, x, values, int8_bound(x, values))


def test_sums_are_exact_and_scaled_once() -> None:
    """Of numbers that quantize to themselves the result is the integer product, to the last bit."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randint(-127, 128, (80, 200), generator=generator).float()
    x = torch.randint(-127, 128, (40, 200), generator=generator).float()
    w[:, 0] = x[:, 0] = 127
    x[:, 1] = -128
    executable = Executable(plain_linear(w * 0.5), threads=1, precision="int8")
    assert torch.equal(executable(x * 4.0)[0], x @ w.T * 2)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names flags of x86 compilers")
def test_every_path_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX tiles, vpdpbusd, AVX2 and plain C++, where this CPU has them."""
    values = torch.randn(115, 232, generator=torch.Generator().manual_seed(1))
    x = torch.randn(67, 232, generator=torch.Generator().manual_seed(2))
    results = []
    for flags in ((), ("-mno-amx-int8",), ("-mno-avx512f",), ("-march=x86-64-v2",)):
        monkeypatch.setattr(executable_module, "FLAGS", (*FLAGS, *flags))
        executable = Executable(plain_linear(values), threads=1, precision="int8")
        check(executable, x, values, int8_bound(x, values))
        results.append(executable(x)[0])
    for result in results[1:]:
        assert same_bits(result, results[0])


@pytest.mark.parametrize("count", [1, 5, 40])
def test_zeros_and_what_is_not_finite(count: int) -> None:
    values = torch.randn(80, 96, generator=torch.Generator().manual_seed(0))
    values[7] = 0
    executable = Executable(plain_linear(values), threads=1, precision="int8")
    x = torch.zeros(count, 96)
    assert not executable(x)[0].any()
    x[:, 3] = 1.0
    assert not executable(x)[0][:, 7].any()
    for wrong in (torch.nan, torch.inf):
        x[0, 40] = wrong
        got = executable(x)[0]
        assert not got[0].isfinite().any() and got[1:].isfinite().all()
    values[9, 5] = torch.nan
    got = Executable(plain_linear(values), threads=1, precision="int8")(x[1:])[0]
    assert got[:, 9].isnan().all() and got[:, :9].isfinite().all()


def test_rows_too_long_for_exact_sums_stay_in_bfloat16() -> None:
    for columns, expected in ((WHOLE_MOST_COLUMNS, WHOLE), (WHOLE_MOST_COLUMNS + 32, "BF16")):
        plan = plain_linear(torch.zeros(1).expand(64, columns))
        assert find_packings(plan, "int8")["w"].format == expected
    assert 255 * 127 * WHOLE_MOST_COLUMNS < 1 << 31
