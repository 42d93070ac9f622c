"""Values that only packed products read: which they are, and that storing them narrow changes no bit."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Integer
from torch import Tensor, nn

import torchweld.codegen.executable as executable_module
import torchweld.codegen.narrow_plan as narrow_module
from tests.codegen.cpp_cases import same_bits
from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Kernel, MatmulPart, Store, size_symbol
from torchweld.codegen.library_runs import bucket_of
from torchweld.codegen.narrow_plan import narrow_values, narrowed
from torchweld.codegen.plan import Launch, Plan, ValueSpec
from torchweld.graph.capture import capture
from torchweld.graph.terms import Axis, Contract, Load, Ref, Term, op
from torchweld.optimizer.compile import Options, compile_program

F32 = torch.float32
FORMATS = {"bf16": {"first": "BF16", "second": "BF16"}, "int8": {"first": "I8", "second": "I8"}}
WIDTHS = (64, 96, 128)  # in, hidden, out
ROWS = size_symbol("M")


def _linear(name: str, n_extent: int, k_extent: int, function: str | None) -> Kernel:
    """y = function(x @ w.T)"""
    m, n, k = Axis("m", ROWS), Axis("n", Integer(n_extent)), Axis("k", Integer(k_extent))
    contract = Contract(F32, k, Load(F32, "x", (m.symbol, k.symbol)), Load(F32, "w", (n.symbol, k.symbol)))
    value: Term = Ref(F32, "acc")
    store = Store("y", (m.symbol, n.symbol), op(function, value) if function else value)
    part = MatmulPart((), (m,), n, (), (Bind("acc", contract),), (store,))
    buffers = (Buffer("x", F32, (ROWS, k.extent), "input"), Buffer("w", F32, (n.extent, k.extent), "weight"),
               Buffer("y", F32, (ROWS, n.extent), "output"))  # fmt: skip
    return Kernel(name, buffers, ("M",), (part,))


@functools.cache
def two_layers(function: str) -> Plan:
    """y = function(x @ first.T) @ second.T"""
    inner, hidden, outer = WIDTHS
    generator = torch.Generator().manual_seed(0)
    weights = {
        "first": torch.randn(hidden, inner, generator=generator) * 0.2,
        "second": torch.randn(outer, hidden, generator=generator),
    }
    launches = (
        Launch(_linear("up", hidden, inner, function), ("x", "first", "middle")),
        Launch(_linear("down", outer, hidden, None), ("middle", "second", "y")),
    )
    values = {
        "middle": ValueSpec("middle", F32, (ROWS, Integer(hidden))),
        "y": ValueSpec("y", F32, (ROWS, Integer(outer))),
    }
    return Plan((ValueSpec("x", F32, (ROWS, Integer(inner))),), weights, values, launches, ("y",), ("M",))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX tiles: what is narrow does not depend on the machine of the test."""
    monkeypatch.setattr(
        narrow_module, "cpu_features", lambda: frozenset({"amx_tile", "amx_bf16", "avx512_bf16"})
    )
    monkeypatch.setattr(narrow_module, "chosen_path", lambda: "native")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_only_products_read_is_narrow(precision: Precision, tiles: None) -> None:
    plan = two_layers("erf")
    assert narrow_values(plan, FORMATS[precision], precision) == {"middle"}
    narrow = narrowed(plan, FORMATS[precision], precision)
    assert narrow.values["middle"].dtype == (torch.bfloat16 if precision == "bf16" else F32)
    first, second = narrow.launches()
    assert first.kernel.parts[0].stores[0].value.name == "erf_short"  # type: ignore[attr-defined]
    assert first.kernel.buffer("y").dtype == second.kernel.buffer("x").dtype == narrow.values["middle"].dtype
    narrow.check()


def test_what_anybody_else_reads_stays(tiles: None) -> None:
    plan, formats = two_layers("erf"), FORMATS["bf16"]
    first, second = plan.launches()
    assert narrow_values(plan, formats, "f32") == set()
    assert narrow_values(plan, {"first": "BF16"}, "bf16") == set()  # its reader's weight is not packed
    assert narrow_values(plan, FORMATS["int8"], "bf16") == set()
    assert narrow_values(replace(plan, outputs=("y", "middle")), formats, "bf16") == set()
    part = second.kernel.parts[0]
    assert isinstance(part, MatmulPart)
    m, n = part.rows[0], part.n
    added = op("add", part.stores[0].value, Load(F32, "x", (m.symbol, Integer(0))))
    stores = (Store("y", (m.symbol, n.symbol), added),)
    kernel = replace(second.kernel, parts=(replace(part, stores=stores),))
    steps = (first, Launch(kernel, second.arguments))
    assert narrow_values(replace(plan, steps=steps), formats, "bf16") == set()  # the epilogue reads it, too


def test_without_tiles_a_few_rows_are_multiplied_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_module, "cpu_features", lambda: frozenset({"avx512_bf16"}))
    assert narrow_values(two_layers("erf"), FORMATS["bf16"], "bf16") == set()


@functools.cache
def _built(precision: Precision, narrow: bool) -> Executable:
    before = executable_module.narrowed
    try:
        if not narrow:
            executable_module.narrowed = lambda plan, formats, precision: plan
        return Executable(two_layers("relu"), threads=2, precision=precision)
    finally:
        executable_module.narrowed = before


@given(count=st.integers(0, 70), precision=st.sampled_from(["bf16", "int8"]))
@settings(max_examples=30)
def test_rounding_earlier_changes_no_bit(count: int, precision: Precision) -> None:
    x = torch.randn(count, WIDTHS[0], generator=torch.Generator().manual_seed(count))
    got, want = (_built(precision, narrow)(x)[0] for narrow in (True, False))
    assert same_bits(got, want)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_short_erf_is_lost_in_the_rounding(precision: Precision) -> None:
    plan = two_layers("erf")
    executable = Executable(plan, threads=2, precision=precision)
    x = torch.randn(40, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    first, second = (plan.constants[name].double() for name in ("first", "second"))
    want = torch.erf(x.double() @ first.T) @ second.T
    off = (executable(x)[0].double() - want).norm() / want.norm()
    assert off < {"bf16": 6e-3, "int8": 2e-2}[precision]
    for count in (1, 7, 16):
        assert same_bits(executable(x[:count])[0], executable(x[:16])[0][:count].contiguous())


class TwoLayers(nn.Module):
    """float32 [M, 64] -> [M, 64]; GELU's results are read by the second product only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [M, 64] -> [M, 64]."""
        result: Tensor = self.down(functional.gelu(self.up(x)))
        return result


def test_aten_reads_and_writes_narrow_values(tiles: None) -> None:
    """The first product through ATen and the second of our own, the other way round, and both through ATen."""
    x, model = torch.randn(100, 64), TwoLayers().eval()
    options = Options(precision="bf16", threads=1, tune="never")
    executable = compile_program(capture(model, (x,), {}, dynamic=True), options=options).executable
    assert executable is not None
    assert [v.dtype for v in executable.plan.values.values()].count(torch.bfloat16) == 1
    want = model.double()(x.double())
    kernels = list(executable.plan.library)
    assert len(kernels) == 2
    for chosen in ([kernels[0]], [kernels[1]], kernels):
        executable.use_library({name: [bucket_of(100)] for name in chosen})
        off = (executable(x)[0].double() - want).norm() / want.norm()
        assert off < 6e-3, chosen
