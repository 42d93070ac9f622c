"""Instruction paths that this CPU would not take by itself: every kind of kernel, right and independent of other rows.

A path is chosen by TORCHWELD_ISA, as a user would. Each gets one program with a linear layer for every stored format,
an attention and a norm. They are compiled without optimization: for AVX2 gcc takes 20 times as long with -O1 (14 s),
and what differs between paths is the C++ that the headers choose. test_cpp_packed.py has paths with -O3.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.codegen.cpp_cases import plan_of, random_buffers, same_bits
from tests.codegen.test_attention_precision import reference
from tests.codegen.test_cpp_formats import FORMATS, stored_matmul
from tests.codegen.test_cpp_packed import bf16_bound, int8_bound, rounding_bound
from tests.codegen.test_packing import weight
from tests.kernels_by_hand import attention, rms_norm
from torchweld.codegen import instructions, toolchain
from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp_packed import FEW_ROWS, Precision
from torchweld.codegen.executable import Executable
from torchweld.codegen.instructions import InstructionsError, check_path, chosen_path, target_flags
from torchweld.codegen.plan import Launch, Plan, ValueSpec
from torchweld.codegen.toolchain import ToolchainError, compile_shared, find_compiler, load

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names flags of x86 compilers")
PATHS = [path for path in instructions.PATHS if path != "native"]
COLUMNS, ROWS, MANY = 256, 83, 37


def choose(path: str, patch: pytest.MonkeyPatch) -> None:
    """Compile for `path`, and quickly."""
    patch.setenv("TORCHWELD_ISA", path)
    patch.setattr(toolchain, "BASE_FLAGS", ("-std=c++17", "-O0", "-fPIC", "-shared"))


@dataclass(frozen=True)
class Program:
    """One executable with a linear layer per format on one x [M, COLUMNS], and the values of the weights."""

    executable: Executable
    values: dict[str, Tensor]


@functools.cache
def linears(path: str, precision: Precision) -> Program:
    """Compiled for `path`, in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        choose(path, patch)
        stored = {name: weight(name, ROWS, COLUMNS) for name in FORMATS}
        plans, constants = [], {}
        for name, (data, _) in stored.items():
            kernel = stored_matmul(name, ROWS, COLUMNS, data.shape[1])
            plans.append(Launch(kernel, ("x", f"w_{name}", f"y_{name}")))
            constants[f"w_{name}"] = data
        specs = {b.name: ValueSpec(b.name, b.dtype, b.shape) for b in plans[0].kernel.buffers}
        values = {f"y_{name}": replace(specs["y"], name=f"y_{name}") for name in stored}
        plan = Plan((specs["x"],), constants, values, tuple(plans), tuple(values), ("M",))
        executable = Executable(plan, threads=1, precision=precision)
    return Program(executable, {name: values for name, (_, values) in stored.items()})


def check_linears(path: str, precision: Precision) -> None:
    """Every format within the bound of the precision, for few and many rows; rows do not matter."""
    program = linears(path, precision)
    x = torch.randn(MANY, COLUMNS, generator=torch.Generator().manual_seed(0))
    few, many = program.executable(x[:FEW_ROWS].contiguous()), program.executable(x)
    for number, values in enumerate(program.values.values()):
        bound = torch.zeros(())
        if precision != "f32":
            bound = torch.maximum(bf16_bound(x, values), int8_bound(x, values))
        want, limit = x.double() @ values.double().T, bound + rounding_bound(x, values)
        assert bool(((many[number].double() - want).abs() <= limit).all()), list(program.values)[number]
        assert bool(((few[number].double() - want[:FEW_ROWS]).abs() <= limit[:FEW_ROWS]).all())
    for whole, counts in ((few, (1, 2, 3, 5, 8, 9)), (many, (17, 32, 33))):
        for count in counts:
            part = program.executable(x[:count].contiguous())
            same = [same_bits(a, b[:count].contiguous()) for a, b in zip(part, whole, strict=True)]
            assert all(same), (count, same)


@on_x86
@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("path", PATHS)
def test_every_stored_format(path: str, precision: Precision) -> None:
    check_linears(path, precision)


@on_x86
@pytest.mark.parametrize("path", PATHS)
def test_stored_values_are_exact(path: str) -> None:
    program = linears(path, "f32")
    for name, got in zip(program.values, program.executable(torch.eye(COLUMNS)), strict=True):
        assert torch.equal(got.T, program.values[name]), name


@on_x86
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
def test_attention(path: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(path, monkeypatch)
    kernel = attention("causal", 0, heads=4, groups=2, width=32)
    executable = Executable(plan_of(kernel), threads=1, precision=precision)
    inputs = list(random_buffers(kernel, {"B": 1, "S": 150}).values())
    (got,) = executable(*inputs)
    error = float((got.double() - reference(("causal", 0), (4, 2, 32), 0.0, inputs)).abs().max())
    assert error < (1e-5 if precision == "f32" else 0.05 * float(inputs[2].abs().max()))
    for length in (17, 64, 65) if precision == "bf16" else (1, 2, 17, 64, 65):
        (part,) = executable(*(t[:, :length].contiguous() for t in inputs))
        assert same_bits(part, got[:, :length].contiguous()), length


@on_x86
@pytest.mark.parametrize("path", PATHS)
def test_rows(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(path, monkeypatch)
    kernel = rms_norm()
    executable = Executable(plan_of(kernel), threads=1)
    inputs = list(random_buffers(kernel, {"B": 2, "S": 19}).values())
    got = executable(*inputs)
    monkeypatch.setenv("TORCHWELD_ISA", "native")
    want = Executable(plan_of(kernel), threads=1)(*inputs)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    x, *others = inputs
    for whole, part in zip(got, executable(x[:, :7].contiguous(), *others), strict=True):
        assert same_bits(part, whole[:, :7].contiguous())


@on_x86
@pytest.mark.parametrize("path", PATHS)
def test_packing_is_the_same_program_everywhere(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What packs the weights, and the team of threads, compile without the instructions of this CPU."""
    choose(path, monkeypatch)
    runtime = Path(instructions.__file__).parent / "runtime"
    for name, symbol in (("pack", "tw_pack"), ("team", "tw_run")):
        source = (runtime / f"{name}.cpp").read_text(encoding="utf-8")
        load(
            compile_shared(source, cache=Cache(), flags=("-fno-exceptions", "-fno-rtti"), name=name),
            (symbol,),
        )


@on_x86
def test_the_path_decides_the_code_and_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """extern "C" int width() {
#if defined(__AMX_TILE__)
    return 1024;
#elif defined(__AVX512F__)
    return 512;
#elif defined(__AVX2__)
    return 256;
#else
    return 128;
#endif
}
"""
    cache, widths = Cache(tmp_path), {}
    for path in instructions.PATHS:
        monkeypatch.setenv("TORCHWELD_ISA", path)
        widths[path] = load(compile_shared(source, cache=cache), ("width",)).width()
    assert (widths["avx512"], widths["avx2"], widths["portable"]) == (512, 256, 128)
    assert len(cache.entries()) == 4 and widths["native"] >= 512


def test_without_the_variable_it_is_all_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHWELD_ISA", raising=False)
    assert chosen_path() == "native" and target_flags("native") == ("-march=native",)
    monkeypatch.setenv("TORCHWELD_ISA", " ")
    assert chosen_path() == "native"


def test_what_this_cpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code with instructions that the CPU lacks would kill the process."""
    monkeypatch.setattr(instructions, "cpu_features", lambda: frozenset({"avx2"}))
    with pytest.raises(InstructionsError, match="TORCHWELD_ISA=avx2: this CPU has no fma, f16c"):
        check_path("avx2")
    monkeypatch.setenv("TORCHWELD_ISA", "avx512")
    with pytest.raises(ToolchainError, match="this CPU has no avx512f"):
        find_compiler()
    with pytest.raises(InstructionsError, match="expected one of native, avx512, avx2, portable"):
        check_path("AVX2")
    assert check_path("portable") == "portable"
