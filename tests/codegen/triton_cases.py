"""Run printed kernels in Triton's interpreter and compare them with the reference interpreter.

`python -m tests.codegen.triton_cases FOLDER CASE...` prints one JSON line per case.  A process of its own, because
Triton is an interpreter or a compiler from the moment it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import sympy
import torch
from torch import Tensor

from tests import kernels_by_hand as by_hand
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import (
    AttentionPart,
    Bind,
    Buffer,
    Kernel,
    MatmulPart,
    RowPart,
    Schedule,
    Store,
    size_symbol,
)
from torchweld.codegen.triton import TritonKernel, build_triton
from torchweld.graph.formats import FORMATS, get_format
from torchweld.graph.index import evaluate
from torchweld.graph.terms import (
    Attend,
    Axis,
    Const,
    Contract,
    Fold,
    Guard,
    IndexValue,
    Load,
    Monoid,
    Ref,
    Term,
    cast,
    op,
)

F32, I64 = torch.float32, torch.int64
B, S = size_symbol("B"), size_symbol("S")
SIZES = ({"B": 2, "S": 7}, {"B": 1, "S": 1}, {"B": 2, "S": 37}, {"B": 0, "S": 3}, {"B": 3, "S": 0})


@dataclass(frozen=True)
class Case:
    """A kernel, the sizes to run it at, tensors that are not to be random, and the relative tolerance."""

    kernel: Kernel
    sizes: tuple[dict[str, int], ...] = SIZES
    fixed: tuple[tuple[str, Tensor], ...] = ()
    tolerance: float = 2e-5


def axis(name: str, extent: int | sympy.Expr) -> Axis:
    return Axis(name, sympy.sympify(extent))


def pointwise(outputs: dict[str, Term], inputs: dict[str, torch.dtype]) -> Kernel:
    """One output per term, all over i < S."""
    i = axis("i", S)
    stores = tuple(Store(name, (i.symbol,), term) for name, term in outputs.items())
    buffers = [Buffer(name, dtype, (S,), "input") for name, dtype in inputs.items()]
    buffers += [Buffer(name, term.dtype, (S,), "output") for name, term in outputs.items()]
    return Kernel("pointwise", tuple(buffers), ("S",), (RowPart((i,), (), (), stores),))


def at(name: str, dtype: torch.dtype) -> Load:
    return Load(dtype, name, (axis("i", S).symbol,))


FLOATS = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, -0.3, 1e-5, -1e-4, 0.1, 3.7, -7.2, 12.0, -20.0,
                       88.0, 0.19, 0.21, 1e30, float("inf"), float("-inf"), float("nan")])  # fmt: skip


def float_operations(positive: bool) -> Case:
    """Every unary and binary float operation; those of positive numbers apart."""
    x, y = at("x", F32), at("y", F32)
    unary = ["log", "log2", "log1p", "sqrt", "rsqrt"] if positive else [
        "neg", "abs", "exp", "exp2", "expm1", "reciprocal", "tanh", "sigmoid", "erf", "floor", "ceil", "round",
        "trunc", "isnan", "isinf", "sign", "relu"]  # fmt: skip
    binary = ["pow", "div"] if positive else [
        "add", "sub", "mul", "div", "floordiv", "mod", "max", "min", "eq", "ne", "lt", "le", "gt", "ge",
        "atan2"]  # fmt: skip
    outputs = {f"{name}_out": op(name, x) for name in unary}
    outputs |= {f"{name}_out": op(name, x, y) for name in binary}
    values = FLOATS[(FLOATS > 0) & FLOATS.isfinite()] if positive else FLOATS
    values = values[(values.abs() < 1e20) | ~values.isfinite()]  # a remainder needs the quotient's last digit
    pairs = torch.cartesian_prod(values, values[values.abs() < 1e20] if not positive else values[values < 10])
    fixed = (("x", pairs[:, 0].contiguous()), ("y", pairs[:, 1].contiguous()))
    return Case(pointwise(outputs, {"x": F32, "y": F32}), ({"S": len(pairs)},), fixed, tolerance=2e-6)


def trigonometry() -> Case:
    x = at("x", F32)
    outputs = {"sin_out": op("sin", x), "cos_out": op("cos", x)}
    small = torch.linspace(-40, 40, 801)
    x_values = torch.cat(
        [small, torch.tensor([0.0, 8191.0, -8191.0, 123456.7, 3e7, 1e9, float("nan"), float("inf")])]
    )
    fixed = (("x", x_values),)
    return Case(pointwise(outputs, {"x": F32}), ({"S": len(x_values)},), fixed, tolerance=3e-7)


def integer_operations() -> Case:
    """Floor semantics, shifts and bit operations on signed and unsigned integers, and casts between all kinds."""
    a, b, u = at("a", torch.int32), at("b", torch.int32), at("u", torch.uint8)
    flag = op("lt", a, b)
    outputs: dict[str, Term] = {
        f"{n}_out": op(n, a, b) for n in ("add", "sub", "mul", "floordiv", "mod", "max", "min")
    }
    outputs |= {f"{n}_out": op(n, a, b) for n in ("and", "or", "xor")}
    outputs["not_out"] = op("not", flag)
    outputs["both"] = op("and", flag, op("gt", a, Const(torch.int32, 3)))
    outputs["bitwise"] = op("bitwise_not", a)
    outputs["shifted"] = op("shl", u, Const(torch.uint8, 3))
    outputs["halved"] = op("shr", u, Const(torch.uint8, 1))
    outputs["wrapped"] = op("add", u, Const(torch.uint8, 250))
    outputs["truncated"] = cast(op("div", cast(a, F32), Const(F32, 3.0)), torch.int32)
    outputs["chosen"] = op("where", flag, Const(I64, 5), cast(a, I64))
    outputs["position"] = op("mul", IndexValue(I64, axis("i", S).symbol), Const(I64, 1 << 40))
    word = op("or", cast(u, torch.uint16), op("shl", cast(u, torch.uint16), Const(torch.uint16, 8)))
    outputs["half"] = cast(op("bitcast", word, dtype=torch.float16), F32)
    pairs = torch.tensor(
        [[7, 2], [-7, 2], [7, -2], [-7, -2], [6, 3], [-6, 3], [0, 5], [-1, 100]], dtype=torch.int32
    )
    fixed = (("a", pairs[:, 0].contiguous()), ("b", pairs[:, 1].contiguous()))
    kernel = pointwise(outputs, {"a": torch.int32, "b": torch.int32, "u": torch.uint8})
    return Case(kernel, ({"S": len(pairs)},), fixed)


def folds(width: int | sympy.Expr, dtype: torch.dtype = F32) -> Case:
    """Every monoid over the last axis; a NaN in one row, equal numbers in another."""
    r, k = axis("r", B), axis("k", width)
    body = Load(dtype, "x", (r.symbol, k.symbol))
    kinds = ["sum", "max", "min", "any", "all", "argmax", "argmin"]
    binds, stores, outputs = [], [], []
    for kind in kinds:
        out = {"any": torch.bool, "all": torch.bool, "argmax": I64, "argmin": I64}.get(kind, dtype)
        inner = op("gt", body, Const(dtype, 1)) if kind in ("any", "all") else body
        binds.append(Bind(f"{kind}_value", Fold(out, Monoid(kind), (k,), inner)))  # type: ignore[arg-type]
        stores.append(Store(f"{kind}_out", (r.symbol,), Ref(out, f"{kind}_value")))
        outputs.append(Buffer(f"{kind}_out", out, (B,), "output"))
    if isinstance(width, int) and width < 16:
        binds.append(Bind("product", Fold(dtype, Monoid("prod"), (k,), body)))
        stores.append(Store("prod_out", (r.symbol,), Ref(dtype, "product")))
        outputs.append(Buffer("prod_out", dtype, (B,), "output"))
    part = RowPart((r,), (), tuple(binds), tuple(stores))
    shape = (B, sympy.sympify(width))
    sizes = ({"B": 4, "S": 1100}, {"B": 1, "S": 1}) if width is S else ({"B": 4}, {"B": 1})
    names = ("B", "S") if width is S else ("B",)
    kernel = Kernel("folds", (Buffer("x", dtype, shape, "input"), *outputs), names, (part,))
    return Case(kernel, sizes, (("x", torch.empty(0)),))


def serial_and_flattened_folds() -> Case:
    """y[b, d] = sum over s of x[b, s, d]: the columns are taken; z[b] = max over (s, d): two axes, one loop."""
    b, d, s = axis("b", B), axis("d", 19), axis("s", S)
    s2, d2 = axis("s2", S), axis("d2", 19)
    total = Fold(F32, Monoid("sum"), (s,), Load(F32, "x", (b.symbol, s.symbol, d.symbol)))
    place = Fold(I64, Monoid("argmax"), (s,), Load(F32, "x", (b.symbol, s.symbol, d.symbol)))
    top = Fold(F32, Monoid("max"), (s2, d2), Load(F32, "x", (b.symbol, s2.symbol, d2.symbol)))
    stores = (Store("y", (b.symbol, d.symbol), total), Store("i", (b.symbol, d.symbol), place))
    part = RowPart(
        (b,), (d,), (Bind("top", top),), (*stores, Store("z", (b.symbol, d.symbol), Ref(F32, "top")))
    )
    shape = (B, sympy.Integer(19))
    buffers = (Buffer("x", F32, (B, S, sympy.Integer(19)), "input"), Buffer("y", F32, shape, "output"),
               Buffer("i", I64, shape, "output"), Buffer("z", F32, shape, "output"))  # fmt: skip
    return Case(Kernel("sums", buffers, ("B", "S"), (part,)), ({"B": 2, "S": 5}, {"B": 1, "S": 1}))


def guarded_everything() -> Case:
    """Guards on columns around a scalar load and a row load, nested, with a fold inside, and a window of an input."""
    b, d, k = axis("b", B), axis("d", 11), axis("k", 5)
    low = op("lt", IndexValue(I64, d.symbol), Const(I64, 4))
    middle = op("lt", IndexValue(I64, d.symbol), Const(I64, 7))
    one = Load(F32, "w", (sympy.Integer(0),))
    row = Load(F32, "x", (b.symbol, d.symbol - 4))
    total = Fold(F32, Monoid("sum"), (k,), Load(F32, "x", (b.symbol, k.symbol)))
    value = Guard(F32, low, one, Guard(F32, middle, row, total))
    part = RowPart((b,), (d,), (), (Store("y", (b.symbol, d.symbol), value),))
    five = sympy.Integer(5)
    buffers = (Buffer("x", F32, (B, five), "input"), Buffer("w", F32, (sympy.Integer(1),), "weight"),
               Buffer("y", F32, (B, sympy.Integer(11)), "output"))  # fmt: skip
    return Case(Kernel("guards", buffers, ("B",), (part,)), ({"B": 3}, {"B": 1}))


def half_linear(dtype: torch.dtype) -> Case:
    """16-bit operands of one type go to tl.dot as they are."""
    m, n, k = axis("m", S), axis("n", 20), axis("k", 24)
    a, b = (cast(Load(dtype, t, (x.symbol, k.symbol)), F32) for t, x in (("x", m), ("w", n)))
    part = MatmulPart((), (m,), n, (), (Bind("acc", Contract(F32, k, a, b)),),
                      (Store("y", (m.symbol, n.symbol), Ref(F32, "acc")),))  # fmt: skip
    buffers = (Buffer("x", dtype, (S, k.extent), "input"), Buffer("w", dtype, (n.extent, k.extent), "weight"),
               Buffer("y", F32, (S, n.extent), "output"))  # fmt: skip
    return Case(Kernel("half_linear", buffers, ("S",), (part,)), ({"S": 5},))


def masked_prologue() -> Case:
    """A prologue that is not zero where k is masked, and a B operand that does not depend on n."""
    m, n, k = axis("m", S), axis("n", 20), axis("k", 13)
    a = op("add", Load(F32, "x", (m.symbol, k.symbol)), Const(F32, 3.0))
    acc = Contract(F32, k, a, op("exp", Load(F32, "w", (k.symbol,))))
    part = MatmulPart(
        (), (m,), n, (), (Bind("acc", acc),), (Store("y", (m.symbol, n.symbol), Ref(F32, "acc")),)
    )
    buffers = (Buffer("x", F32, (S, k.extent), "input"), Buffer("w", F32, (k.extent,), "weight"),
               Buffer("y", F32, (S, n.extent), "output"))  # fmt: skip
    return Case(Kernel("masked_prologue", buffers, ("S",), (part,)), ({"S": 5},))


def additive_mask(blind: bool) -> Case:
    """Attention with an additive mask, keys of their own length, and optionally a query that sees nothing."""
    b, t, s, d, f = axis("b", B), axis("t", 6), axis("s", S), axis("d", 24), axis("f", 40)
    q, k, v = (
        Load(F32, n, (b.symbol, x.symbol, y.symbol)) for n, x, y in (("q", t, d), ("k", s, d), ("v", s, f))
    )
    mask = Load(F32, "bias", (t.symbol, s.symbol))
    attend = Attend(F32, s, d, q, k, v, mask, "causal", 0, 0.2, 0.0, t.symbol, t.extent)
    store = Store("o", (b.symbol, t.symbol, f.symbol), Ref(F32, "out"))
    part = AttentionPart((b,), t, f, Bind("out", attend), (store,))
    buffers = (Buffer("q", F32, (B, t.extent, d.extent), "input"), Buffer("k", F32, (B, S, d.extent), "input"),
               Buffer("v", F32, (B, S, f.extent), "input"), Buffer("bias", F32, (t.extent, S), "input"),
               Buffer("o", F32, (B, t.extent, f.extent), "output"))  # fmt: skip
    bias = torch.randn(6, 50)
    if blind:
        bias[2] = float("-inf")
    return Case(Kernel("biased", buffers, ("B", "S"), (part,)), ({"B": 2, "S": 50},), (("bias", bias),))


def with_schedule(kernel: Kernel, schedule: Schedule) -> Kernel:
    return replace(kernel, parts=tuple(replace(part, schedule=schedule) for part in kernel.parts))


def bad_index() -> Case:
    """Out of range reads 0: the interpreter of the IR gets a legal index and a row of zeros instead."""
    kernel = by_hand.gather_and_concat()
    return Case(kernel, ({"B": 3},), (("ids", torch.tensor([0, 11, -12])),))


CASES: dict[str, Callable[[], Case]] = {
    **{name: (lambda make=make: Case(make())) for name, make in by_hand.ALL.items()},
    "float_operations": lambda: float_operations(False),
    "float_operations_positive": lambda: float_operations(True),
    "trigonometry": trigonometry,
    "integer_operations": integer_operations,
    "folds_tile": lambda: folds(13),
    "folds_loop": lambda: folds(4099),
    "folds_dynamic": lambda: folds(S),
    "folds_integer": lambda: folds(13, torch.int64),
    "folds_serial": serial_and_flattened_folds,
    "guards": guarded_everything,
    "half_linear_f16": lambda: half_linear(torch.float16),
    "half_linear_bf16": lambda: half_linear(torch.bfloat16),
    "add_relu_f16": lambda: Case(by_hand.add_relu_broadcast(torch.float16)),
    # Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest.
    "add_relu_bf16": lambda: Case(by_hand.add_relu_broadcast(torch.bfloat16), tolerance=2.0**-7),
    "masked_prologue": masked_prologue,
    "attention_additive_mask": lambda: additive_mask(False),
    "attention_blind_row": lambda: additive_mask(True),
    "one_row_per_tile": lambda: Case(
        with_schedule(by_hand.norm_gated_linear(), Schedule(block_rows=1, block_n=32, block_k=32))
    ),
    "one_row_per_program": lambda: Case(with_schedule(by_hand.rms_norm(), Schedule(block_rows=1, block_n=64))),
    "rms_norm_loop": lambda: Case(by_hand.rms_norm(4100), ({"B": 2, "S": 1},)),
    "rms_norm_heads": lambda: Case(by_hand.rms_norm(64), ({"B": 2, "S": 3},)),
    "attention_wide_heads": lambda: Case(by_hand.attention(width=72, heads=2, groups=1), ({"B": 1, "S": 19},)),
    "bad_index": bad_index,
    **{
        f"decode_{name}": lambda name=name: Case(
            by_hand.norm_gated_linear(name, 512, 24, get_format(name).row_bytes(512)), ({"B": 1, "S": 3},)
        )
        for name in FORMATS if name != "F32"
    },
}  # fmt: skip


def make_tensors(case: Case, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Random inputs; folds get a row with a NaN and one with equal numbers."""
    from tests.codegen.test_interpreter import make_buffers

    tensors = make_buffers(case.kernel, sizes)
    for name, tensor in case.fixed:
        if tensor.numel():
            tensors[name] = tensor
            continue
        rows = tensors[name]
        if len(rows) > 2:
            rows[1] = 2
            rows[2, -1] = float("nan") if rows.is_floating_point() else 9
    return tensors


def load_printed(path: Path, printed: TritonKernel) -> ModuleType:
    """A printed kernel and its launcher as a module, written to `path`."""
    path.write_text("import torch\nimport triton\nimport triton.language as tl\n\n\n" + printed.source
                    + "\n\n" + printed.launcher, encoding="utf-8")  # fmt: skip
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_case(name: str, folder: Path) -> str | None:
    """What is wrong with a case, or None."""
    case = CASES[name]()
    module = load_printed(folder / f"{name}.py", build_triton(case.kernel))
    for sizes in case.sizes:
        sizes = {size: sizes[size] for size in case.kernel.sizes}
        if name == "bmm_linear" and sizes["B"] == 0:
            continue  # reads x[0], which does not exist
        tensors = make_tensors(case, sizes)
        outputs = module.launch(
            *(tensors[b.name] for b in case.kernel.buffers if b.role != "output"), **sizes
        )
        if name == "bad_index":
            bad = torch.tensor([False, True, True])
            tensors["ids"] = tensors["ids"].masked_fill(bad, 0)
        wanted = interpret(case.kernel, tensors, sizes)
        for (key, want), got in zip(wanted.items(), outputs, strict=True):
            if name == "bad_index":
                want[1:, : evaluate(sympy.Integer(5), {})] = 0
            if problem := difference(got, want, case.tolerance):
                return f"{key} at {sizes}: {problem}"
    return None


def difference(got: Tensor, want: Tensor, tolerance: float) -> str | None:
    """The first kind of difference between two tensors."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    if not want.dtype.is_floating_point:
        return None if torch.equal(got, want) else f"{got.tolist()}, expected {want.tolist()}"
    close = torch.isclose(got.double(), want.double(), rtol=tolerance, atol=0.0, equal_nan=True)
    scale = (
        want.double().nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
        if want.dim() > 1 and want.numel()
        else 1e-2
    )
    close |= (got.double() - want.double()).abs() <= tolerance * scale
    if bool(close.all()):
        return None
    where = int((~close).flatten().int().argmax())
    return f"element {where}: {got.flatten()[where]!r}, expected {want.flatten()[where]!r}"


if __name__ == "__main__":
    for case_name in sys.argv[2:]:
        try:
            result = run_case(case_name, Path(sys.argv[1]))
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps({"case": case_name, "problem": result}), flush=True)
