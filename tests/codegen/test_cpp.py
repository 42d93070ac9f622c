"""The C++ printer on the hand-written kernels: values, row invariance, thread counts, empty sizes, determinism."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sympy import Integer

from tests.codegen.cpp_cases import plan_of, random_buffers, run, same_bits
from tests.kernels_by_hand import ALL, attention, norm_gated_linear, rms_norm
from torchweld.codegen.cpp import print_kernel, print_unit
from torchweld.codegen.executable import Executable
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import Bind, Buffer, Kernel, MatmulPart, RowPart, Store, size_symbol
from torchweld.graph.terms import Axis, Contract, Fold, Load, Monoid, Ref

SIZES = [{"B": 1, "S": 1}, {"B": 2, "S": 5}, {"B": 3, "S": 17}, {"B": 1, "S": 131}, {"B": 2, "S": 0}]
F32 = torch.float32


@pytest.mark.parametrize("name", ALL)
def test_kernels_against_the_interpreter_in_float64(name: str) -> None:
    kernel = ALL[name]()
    executable = Executable(plan_of(kernel), threads=2)
    for seed, sizes in enumerate(SIZES):
        sizes = {size: value for size, value in sizes.items() if size in kernel.sizes}
        buffers = random_buffers(kernel, sizes, seed)
        expected = interpret(kernel, buffers, sizes, torch.float64)
        results = executable(*buffers.values())
        for got, (output, want) in zip(results, expected.items(), strict=True):
            assert got.dtype == kernel.buffer(output).dtype and got.shape == want.shape
            torch.testing.assert_close(
                got.double(), want.double(), rtol=2e-5, atol=1e-4, msg=f"{name} {sizes} {output}"
            )


@pytest.mark.parametrize("name", ALL)
def test_thread_counts_give_the_same_bits(name: str) -> None:
    kernel = ALL[name]()
    sizes = {size: {"B": 3, "S": 70}[size] for size in kernel.sizes}
    buffers = random_buffers(kernel, sizes)
    one, two, three = (run(kernel, buffers, threads) for threads in (1, 2, 3))
    for output in one:
        assert same_bits(one[output], two[output]) and same_bits(one[output], three[output]), output


@pytest.mark.parametrize("make", [rms_norm, norm_gated_linear, lambda: norm_gated_linear("F32")])
def test_a_row_does_not_depend_on_the_rows_beside_it(make) -> None:  # type: ignore[no-untyped-def]
    kernel: Kernel = make()
    buffers = random_buffers(kernel, {"B": 1, "S": 70})
    executable = Executable(plan_of(kernel), threads=2)
    whole = executable(*buffers.values())
    for rows in (*range(1, 17), 65):
        cut = [t[:, :rows] if t.dim() == 3 else t for t in buffers.values()]
        for got, want in zip(executable(*cut), whole, strict=True):
            assert same_bits(got, want[:, :rows].contiguous()), rows


@pytest.mark.parametrize(("mask", "window"), [("causal", 0), ("window", 3), ("window", 70)])
def test_attention_rows_do_not_depend_on_later_positions(mask: str, window: int) -> None:
    kernel = attention(mask, window)
    buffers = random_buffers(kernel, {"B": 2, "S": 150})
    executable = Executable(plan_of(kernel), threads=2)
    (whole,) = executable(*buffers.values())
    for length in (1, 2, 3, 15, 16, 17, 63, 64, 65, 129):
        (got,) = executable(*(t[:, :length] for t in buffers.values()))
        assert same_bits(got, whole[:, :length].contiguous()), length


def test_later_keys_may_hold_nan() -> None:
    kernel = attention("causal")
    buffers = random_buffers(kernel, {"B": 1, "S": 40})
    clean = run(kernel, buffers)["o"]
    for name in ("k", "v"):
        buffers[name][:, 20:] = float("nan")
    dirty = run(kernel, buffers)["o"]
    assert same_bits(dirty[:, :20].contiguous(), clean[:, :20].contiguous())
    assert dirty[:, 20:].isnan().all()


def test_a_query_that_sees_nothing_gives_zero() -> None:
    kernel = attention("none", tensor_mask=True)
    buffers = random_buffers(kernel, {"B": 1, "S": 9})
    buffers["mask"][:, :, 4] = False
    out = run(kernel, buffers)["o"]
    assert (out[:, 4] == 0).all() and not (out[:, 3] == 0).any()


def test_an_index_outside_its_table_names_the_kernel() -> None:
    kernel = ALL["gather_concat"]()
    buffers = random_buffers(kernel, {"B": 4})
    executable = Executable(plan_of(kernel), threads=1)
    executable(*buffers.values())
    for bad in (11, -12, 2**40):
        broken = dict(buffers, ids=torch.tensor([0, 1, bad, 2]))
        with pytest.raises(IndexError, match=r"gather_concat.*index < 11"):
            executable(*broken.values())
    executable(*buffers.values())


def _fold_kernel(kind: str, dtype: torch.dtype, result: torch.dtype, width: int) -> Kernel:
    r, a, b = Axis("r", Integer(3)), Axis("a", Integer(2)), Axis("b", Integer(width))
    body = Load(dtype, "x", (r.symbol, a.symbol, b.symbol))
    fold = Fold(result, Monoid(kind), (a, b), body)  # type: ignore[arg-type]
    part = RowPart((r,), (), (Bind("f", fold),), (Store("y", (r.symbol,), Ref(result, "f")),))
    shape = (Integer(3), Integer(2), Integer(width))
    return Kernel(
        "fold",
        (Buffer("x", dtype, shape, "input"), Buffer("y", result, (Integer(3),), "output")),
        (),
        (part,),
    )


@pytest.mark.parametrize("width", [33, 64, 131])
def test_a_sum_of_floats_has_64_lanes_and_one_tree(width: int) -> None:
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(width)) * 1e3
    x[0] = -0.0
    lanes = torch.zeros(3, 64)
    for a in range(2):
        for first in range(0, width, 64):
            chunk = x[:, a, first : first + 64]
            lanes[:, : chunk.shape[1]] += chunk
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    assert same_bits(run(_fold_kernel("sum", F32, F32, width), {"x": x})["y"], lanes[:, 0].contiguous())


@pytest.mark.parametrize("width", [1, 7, 64, 131])
def test_folds_over_two_axes(width: int) -> None:
    x = torch.randn(3, 2, width)
    x[1, 0, width // 2] = float("nan")
    flat = x.reshape(3, -1)
    for kind, want in {
        "max": flat.amax(1),
        "min": flat.amin(1),
        "prod": flat.prod(1),
        "sum": flat.sum(1),
    }.items():
        torch.testing.assert_close(
            run(_fold_kernel(kind, F32, F32, width), {"x": x})["y"], want, equal_nan=True
        )
    for kind, want in {"argmax": flat.argmax(1), "argmin": flat.argmin(1)}.items():
        assert torch.equal(run(_fold_kernel(kind, F32, torch.int64, width), {"x": x})["y"], want), kind
    bits = torch.rand(3, 2, width) > 0.9
    for kind, want in {"any": bits.flatten(1).any(1), "all": bits.flatten(1).all(1)}.items():
        assert torch.equal(run(_fold_kernel(kind, torch.bool, torch.bool, width), {"x": bits})["y"], want), (
            kind
        )
    whole = torch.randint(-9, 9, (3, 2, width))
    ties = whole.flatten(1)
    assert torch.equal(run(_fold_kernel("argmax", torch.int64, torch.int64, width), {"x": whole})["y"],
                       (ties == ties.amax(1, True)).int().argmax(1))  # fmt: skip


def test_empty_folds_give_the_identity() -> None:
    x = torch.empty(3, 2, 0)
    assert (run(_fold_kernel("sum", F32, F32, 0), {"x": x})["y"] == 0).all()
    assert (run(_fold_kernel("max", F32, F32, 0), {"x": x})["y"] == float("-inf")).all()
    assert (run(_fold_kernel("prod", F32, F32, 0), {"x": x})["y"] == 1).all()


def matmul(dtype: torch.dtype, width: int, features: int, transposed: bool = False) -> Kernel:
    """y[m, n] = sum over k of x[m, k] * w[n, k] (w[k, n] if transposed)."""
    m, n, k = Axis("m", size_symbol("M")), Axis("n", Integer(features)), Axis("k", Integer(width))
    index = (k.symbol, n.symbol) if transposed else (n.symbol, k.symbol)
    real = torch.float64 if dtype == torch.float64 else F32
    contract = Contract(real, k, Load(dtype, "x", (m.symbol, k.symbol)), Load(dtype, "w", index))
    part = MatmulPart(
        (), (m,), n, (), (Bind("acc", contract),), (Store("y", (m.symbol, n.symbol), Ref(real, "acc")),)
    )
    shape = tuple(e.subs({k.symbol: Integer(width), n.symbol: Integer(features)}) for e in index)
    buffers = (Buffer("x", dtype, (size_symbol("M"), Integer(width)), "input"), Buffer("w", dtype, shape, "weight"),
               Buffer("y", real, (size_symbol("M"), Integer(features)), "output"))  # fmt: skip
    return Kernel("matmul", buffers, ("M",), (part,))


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_dtypes_and_odd_sizes(dtype: torch.dtype, transposed: bool) -> None:
    for width, features in ((1, 1), (31, 5), (64, 67), (100, 130), (0, 3)):
        kernel = matmul(dtype, width, features, transposed)
        w = torch.randn(width, features).to(dtype) if transposed else torch.randn(features, width).to(dtype)
        x = torch.randn(70, width).to(dtype)
        want = x.double() @ (w.double() if transposed else w.double().T)
        executable = Executable(plan_of(kernel), threads=2)
        (whole,) = executable(x, w)
        exact = dtype == torch.float64
        torch.testing.assert_close(
            whole.double(), want, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-4
        )
        for rows in (1, 2, 3, 4, 5, 9, 66):
            assert same_bits(executable(x[:rows], w)[0], whole[:rows].contiguous()), (width, rows)


def test_printing_is_deterministic_and_shares_equal_functions() -> None:
    first, second = (
        print_unit([rms_norm(), rms_norm(40), rms_norm()]),
        print_unit([rms_norm(), rms_norm(40), rms_norm()]),
    )
    assert first.source == second.source
    assert first.symbols == ("rms_norm", "rms_norm_2")
    assert [f.name for f in first.functions] == ["rms_norm", "rms_norm_2", "rms_norm"]


def test_functions_are_shared_between_kernels_with_other_buffer_names() -> None:
    kernel = norm_gated_linear()
    renamed = {b.name: f"layer_7_{b.name}" for b in kernel.buffers}
    other = dataclasses.replace(
        kernel,
        name="again",
        buffers=tuple(dataclasses.replace(b, name=renamed[b.name]) for b in kernel.buffers),
        parts=tuple(_renamed(part, renamed) for part in kernel.parts),  # type: ignore[arg-type]
        sources=("model.py:12",),
    )
    assert print_unit([kernel, other]).symbols == (kernel.name,)
    text = print_kernel(other).text
    assert "layer_7_gate" in text and 'extern "C" void again(' in text


def _renamed(part: MatmulPart, names: dict[str, str]) -> MatmulPart:
    from torchweld.graph.terms import Decode, transform

    def replace(term):  # type: ignore[no-untyped-def]
        if isinstance(term, Load):
            return Load(term.dtype, names[term.buffer], term.index)
        if isinstance(term, Decode):
            return Decode(term.dtype, term.format, names[term.buffer], term.row, term.column)
        return None

    return dataclasses.replace(
        part,
        row_binds=tuple(Bind(b.name, transform(b.term, replace)) for b in part.row_binds),
        contracts=tuple(Bind(b.name, transform(b.term, replace)) for b in part.contracts),
        stores=tuple(Store(names[s.buffer], s.index, transform(s.value, replace)) for s in part.stores),
    )
