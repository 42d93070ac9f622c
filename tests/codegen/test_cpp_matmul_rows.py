"""Parts that read the same rows: written once per block, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Integer

from tests.codegen.cpp_cases import plan_of, same_bits
from tests.codegen.test_packing import weight, with_constant
from torchweld.codegen.cpp import print_kernel
from torchweld.codegen.cpp_matmul_rows import READY, numbered_names
from torchweld.codegen.cpp_packed import Precision
from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Bind, Buffer, Kernel, MatmulPart, RowPart, Store, size_symbol
from torchweld.graph.terms import Axis, Const, Contract, Fold, Load, Monoid, Ref, op

F32 = torch.float32
WIDTH, FEATURES, HALF = 96, 128, 64


def side_by_side(eps: tuple[float, ...]) -> Kernel:
    """y{i} = norm(x, eps[i]) @ rows 64 * i to 64 * i + 63 of w, each with axes and names of its own."""
    parts = []
    for number, one in enumerate(eps):
        m, n = Axis(f"m{number}", size_symbol("M")), Axis(f"n{number}", Integer(HALF))
        k, j = Axis(f"k{number}", Integer(WIDTH)), Axis(f"j{number}", Integer(WIDTH))
        xj = Load(F32, "x", (m.symbol, j.symbol))
        square = op("div", Fold(F32, Monoid("sum"), (j,), op("mul", xj, xj)), Const(F32, float(WIDTH)))
        inv = Bind(f"inv{number}", op("rsqrt", op("add", square, Const(F32, one))))
        a = op("mul", Load(F32, "x", (m.symbol, k.symbol)), Ref(F32, inv.name))
        rows = Load(F32, "w", (n.symbol + HALF * number, k.symbol))
        acc = Bind(f"acc{number}", Contract(F32, k, a, rows))
        store = Store(f"y{number}", (m.symbol, n.symbol), op("mul", Ref(F32, acc.name), Ref(F32, inv.name)))
        parts.append(MatmulPart((), (m,), n, (inv,), (acc,), (store,)))
    outs = [Buffer(f"y{i}", F32, (size_symbol("M"), Integer(HALF)), "output") for i in range(len(eps))]
    given_ = (
        Buffer("x", F32, (size_symbol("M"), Integer(WIDTH)), "input"),
        Buffer("w", F32, (Integer(FEATURES), Integer(WIDTH)), "weight"),
    )
    return Kernel("side_by_side", (*given_, *outs), ("M",), tuple(parts))


def behind_its_rows(eps: float, others: tuple[float, ...]) -> Kernel:
    """The kernel of `side_by_side(others)`, and norm(x, eps) as one more result, stored by a part in front."""
    kernel = side_by_side(others)
    r, i, f = Axis("r", size_symbol("M")), Axis("i", Integer(WIDTH)), Axis("f", Integer(WIDTH))
    xf = Load(F32, "x", (r.symbol, f.symbol))
    square = op("div", Fold(F32, Monoid("sum"), (f,), op("mul", xf, xf)), Const(F32, float(WIDTH)))
    scale = Bind("scale", op("rsqrt", op("add", square, Const(F32, eps))))
    value = op("mul", Load(F32, "x", (r.symbol, i.symbol)), Ref(F32, "scale"))
    part = RowPart((r,), (i,), (scale,), (Store("rows", (r.symbol, i.symbol), value),))
    rows = Buffer("rows", F32, (size_symbol("M"), Integer(WIDTH)), "output")
    return replace(kernel, parts=(part, *kernel.parts), buffers=(*kernel.buffers, rows))


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_a_product_stores_the_rows_that_it_computes_anyway(precision: Precision) -> None:
    data, _ = weight("F32", FEATURES, WIDTH)
    eps = (1e-5, 1e-5)
    fused, apart = (with_constant(plan_of(behind_its_rows(e, eps)), w=data) for e in (1e-5, 0.5))
    alone = with_constant(plan_of(side_by_side(eps)), w=data)
    executables = [Executable(plan, threads=2, precision=precision) for plan in (fused, apart, alone)]
    assert ["stored by the part behind it" in e.source for e in executables] == [True, False, False]
    for count in (1, 7, 16, 33, 64, 300):
        x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))
        (*products, rows), (*_, other), plain = (executable(x) for executable in executables)
        assert all(map(same_bits, products, plain))
        for got, one in ((rows, 1e-5), (other, 0.5)):
            want = x.double() * (x.double().square().mean(-1, keepdim=True) + one).rsqrt()
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_rows_are_written_again_only_where_they_differ(precision: Precision) -> None:
    def resets(eps: tuple[float, ...]) -> int:
        return print_kernel(side_by_side(eps), precision=precision).text.count(f"        {READY} = -1;")

    assert resets((1e-5,)) == resets((1e-5, 1e-5)) == 1
    assert resets((1e-5, 1e-3)) == 2


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("eps", [(1e-5, 1e-5), (1e-5, 0.5)])
def test_values(eps: tuple[float, ...], precision: Precision) -> None:
    data, values = weight("F32", FEATURES, WIDTH)
    plan = with_constant(plan_of(side_by_side(eps)), w=data)
    executable = Executable(plan, threads=2, precision=precision)

    @settings(max_examples=20, deadline=None)
    @given(rows=st.sampled_from((1, 5, 16, 17, 32, 33, 70, 257, 520)), seed=st.integers(0, 99))
    def check(rows: int, seed: int) -> None:
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
        for number, (one, got) in enumerate(zip(eps, executable(x), strict=True)):
            inv = (x.double().square().mean(-1, keepdim=True) + one).rsqrt()
            own = values[HALF * number : HALF * (number + 1)].double()
            bound = (
                (x.double().abs() * inv) @ own.abs().T * inv * (2**-8 * 1.02 if precision == "bf16" else 1e-5)
            )
            assert bool(((got.double() - (x.double() * inv) @ own.T * inv).abs() <= bound).all()), number

    check()


def test_numbered_names_keeps_what_is_not_named() -> None:
    assert numbered_names(["b = tw_sqrt(a) + a2;"], {"a", "b"}) == "$0 = tw_sqrt($1) + a2;"
    assert numbered_names(["x = a;"], {"x"}) != numbered_names(["x = b;"], {"x"})
