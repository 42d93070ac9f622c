"""Every pointwise operation of the IR in C++ against torch, at the values where functions break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.codegen.cpp_cases import pointwise, run, same_bits, specials
from torchweld.graph.terms import BINARY, OPS, UNARY, Const, Guard, IndexValue, Op, cast, op

F32, F64, I64 = torch.float32, torch.float64, torch.int64

FLOAT_UNARY: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # operation: torch's function, greatest error in units in the last place
    "neg": (torch.neg, 0), "abs": (torch.abs, 0), "exp": (torch.exp, 2), "exp2": (torch.exp2, 2), "log": (torch.log, 2),
    "log2": (torch.log2, 2), "log1p": (torch.log1p, 2), "expm1": (torch.expm1, 2), "sqrt": (torch.sqrt, 0.5),
    "rsqrt": (torch.rsqrt, 2), "reciprocal": (torch.reciprocal, 0.5), "tanh": (torch.tanh, 3),
    "sigmoid": (torch.sigmoid, 4), "erf": (torch.erf, 3), "sin": (torch.sin, 2), "cos": (torch.cos, 2),
    "floor": (torch.floor, 0), "ceil": (torch.ceil, 0), "round": (torch.round, 0), "trunc": (torch.trunc, 0),
    "relu": (torch.relu, 0),
}  # fmt: skip


def ulps(got: Tensor, want: Tensor) -> Tensor:
    """Distance to the float64 value `want` in units in the last place of float32; 0 where both are NaN or equal."""
    rounded = want.to(F32)
    same = (got.double() == want) | (got.isnan() & want.isnan()) | (got == rounded)
    spacing = torch.maximum(rounded.abs() * 2**-23, torch.tensor(2.0**-149)).double()
    spacing[rounded.abs() < 2.0**-126] *= 2.0**23  # of a subnormal result any digits may be lost (sigmoid)
    return torch.where(same, 0.0, (got.double() - want).abs() / spacing)


@pytest.mark.parametrize("name", FLOAT_UNARY)
def test_float_unary(name: str) -> None:
    function, allowed = FLOAT_UNARY[name]
    x = specials(F32)
    got = run(pointwise(lambda t: op(name, t[0]), [F32], F32, len(x)), {"x0": x})["y"]
    want = function(x.double())
    error = ulps(got, want)
    worst = int(error.nan_to_num(float("inf")).argmax())
    assert error[worst] <= max(allowed, 1) if allowed else same_bits(got, function(x)), (
        f"{name}({x[worst].item()}) = {got[worst].item()}, expected {want[worst].item()}"
    )
    assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("name", [*FLOAT_UNARY])
def test_float64_unary(name: str) -> None:
    x = specials(F64)
    got = run(pointwise(lambda t: op(name, t[0]), [F64], F64, len(x)), {"x0": x})["y"]
    torch.testing.assert_close(got, FLOAT_UNARY[name][0](x), rtol=1e-14, atol=1e-300, equal_nan=True)


def test_short_erf() -> None:
    """erf for values that are rounded to 8 bits next: within 3e-5, odd, and it ends at 1."""
    x = torch.cat([specials(F32), torch.linspace(-4, 4, 20_001)])
    got = run(pointwise(lambda t: Op(F32, "erf_short", (t[0],)), [F32], F32, len(x)), {"x0": x})["y"]
    assert torch.equal(got.isnan(), x.isnan())
    assert float((got.double() - torch.erf(x.double())).nan_to_num().abs().max()) < 3e-5
    flat = x.abs() > 3.1
    assert float((got[flat] - x[flat].sign()).abs().max()) < 2e-6


BINARY_TORCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "max": torch.maximum, "min": torch.minimum,
    "floordiv": torch.floor_divide, "mod": torch.remainder, "pow": torch.pow, "atan2": torch.atan2, "eq": torch.eq,
    "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "and": torch.bitwise_and,
    "or": torch.bitwise_or, "xor": torch.bitwise_xor, "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
}  # fmt: skip
COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "div", "max", "min", "floordiv", "mod", "pow", "atan2", *COMPARE]
)
def test_float_binary(name: str, dtype: torch.dtype) -> None:
    x = specials(dtype)
    y = x.flip(0).clone()
    y[:12] = x[:12]
    result = torch.bool if name in COMPARE else dtype
    got = run(pointwise(lambda t: op(name, *t), [dtype, dtype], result, len(x)), {"x0": x, "x1": y})["y"]
    want = BINARY_TORCH[name](x, y)
    if name == "mod":  # torch's float32 divides first: NaN where the quotient overflows
        want = torch.remainder(x.double(), y.double()).to(dtype)
    if name in ("pow", "atan2"):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-45, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [I64, torch.int32, torch.uint8])
@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "max", "min", "floordiv", "mod", "and", "or", "xor", "shl", "shr", *COMPARE]
)
def test_integer_binary(name: str, dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    x = torch.randint(max(info.min, -(2**40)), min(info.max, 2**40), (300,)).to(dtype)
    y = torch.randint(0, 7, (300,)) if name in ("shl", "shr") else torch.randint(1, 100, (300,))
    if info.min < 0 and name not in ("shl", "shr"):
        y *= 1 - 2 * torch.randint(0, 2, (300,))
    y = y.to(dtype)
    result = torch.bool if name in COMPARE else dtype
    got = run(pointwise(lambda t: op(name, *t), [dtype, dtype], result, 300), {"x0": x, "x1": y})["y"]
    assert torch.equal(got, BINARY_TORCH[name](x, y))


def test_integer_and_bool_unary() -> None:
    x = torch.randint(-50, 50, (64,))
    for name, function in {"neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "bitwise_not": torch.bitwise_not,
                           "relu": torch.relu}.items():  # fmt: skip
        got = run(pointwise(lambda t: op(name, t[0]), [I64], I64, 64), {"x0": x})["y"]  # noqa: B023
        assert torch.equal(got, function(x)), name
    bits = x > 0
    for name in ("not", "bitwise_not"):
        kernel = pointwise(lambda t: op(name, t[0], dtype=torch.bool), [torch.bool], torch.bool, 64)  # noqa: B023
        assert torch.equal(run(kernel, {"x0": bits})["y"], ~bits), name
    for name in ("isnan", "isinf"):
        y = specials(F32)
        got = run(pointwise(lambda t: op(name, t[0]), [F32], torch.bool, len(y)), {"x0": y})["y"]  # noqa: B023
        assert torch.equal(got, getattr(torch, name)(y)), name
    y = specials(F32)
    signs = run(pointwise(lambda t: op("sign", t[0]), [F32], F32, len(y)), {"x0": y})["y"]
    assert torch.equal(signs, torch.sign(y)), "the sign of NaN is 0"


def test_no_operation_is_untested() -> None:
    special = {"sign", "not", "isnan", "isinf", "bitwise_not", "cast", "bitcast", "where"}
    assert set(OPS) == set(FLOAT_UNARY) | set(BINARY_TORCH) | special
    assert set(UNARY) | set(BINARY) | {"cast", "bitcast", "where"} == set(OPS)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sixteen_bit_floats_round_to_nearest_even(half: torch.dtype) -> None:
    x = torch.cat((specials(F32), torch.randn(3000) * 2.0 ** torch.randint(-26, 17, (3000,))))
    stored = run(pointwise(lambda t: t[0], [F32], half, len(x)), {"x0": x})["y"]
    torch.testing.assert_close(stored, x.to(half), rtol=0, atol=0, equal_nan=True)
    rounded = run(pointwise(lambda t: cast(cast(t[0], half), F32), [F32], F32, len(x)), {"x0": x})["y"]
    torch.testing.assert_close(rounded, x.to(half).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_float_is_read(half: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64).to(torch.int16)
    x = bits.view(half)
    got = run(pointwise(lambda t: cast(t[0], F32), [half], F32, len(x)), {"x0": x})["y"]
    torch.testing.assert_close(got, x.float(), rtol=0, atol=0, equal_nan=True)
    numbers = bits.view(torch.uint16)
    read = run(
        pointwise(lambda t: cast(Op(half, "bitcast", (t[0],)), F32), [torch.uint16], F32, len(x)),
        {"x0": numbers},
    )
    torch.testing.assert_close(read["y"], x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sixteen_bit_arithmetic_rounds_once_per_operation(half: torch.dtype) -> None:
    x, y = (torch.randn(500).to(half) for _ in range(2))
    kernel = pointwise(lambda t: op("mul", op("add", t[0], t[1]), t[1]), [half, half], half, 500)
    assert same_bits(run(kernel, {"x0": x, "x1": y})["y"], (x + y) * y)


CASTS = [F32, F64, torch.bfloat16, torch.float16, I64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("source", CASTS)
@pytest.mark.parametrize("target", CASTS)
def test_casts(source: torch.dtype, target: torch.dtype) -> None:
    x = torch.cat((torch.randn(200) * 30, torch.tensor([0.0, 0.5, -0.5, 1.0, 2.5]))).abs()
    x = x.to(source)
    got = run(pointwise(lambda t: cast(t[0], target), [source], target, len(x)), {"x0": x})["y"]
    assert same_bits(got, x.to(target))


def test_bitcasts() -> None:
    x = specials(F32)
    got = run(
        pointwise(lambda t: Op(torch.int32, "bitcast", (t[0],)), [F32], torch.int32, len(x)), {"x0": x}
    )["y"]
    assert torch.equal(got, x.view(torch.int32))


def test_where_and_guard_choose_lazily() -> None:
    x, y = torch.randn(50), torch.randn(50)

    def where(t):  # type: ignore[no-untyped-def]
        return op("where", op("lt", t[0], t[1]), t[0], op("neg", t[1]))

    def guard(t):  # type: ignore[no-untyped-def]
        return Guard(F32, op("lt", t[0], t[1]), op("exp", t[0]), Const(F32, float("nan")))

    got = run(pointwise(where, [F32, F32], F32, 50), {"x0": x, "x1": y})["y"]
    assert torch.equal(got, torch.where(x < y, x, -y))
    got = run(pointwise(guard, [F32, F32], F32, 50), {"x0": x, "x1": y})["y"]
    torch.testing.assert_close(got, torch.where(x < y, x.exp(), torch.nan), equal_nan=True)


def test_constants_and_indices() -> None:
    from torchweld.graph.terms import axis_symbol

    for value in (0.1, -1e-6, 1e30, 3.4e38, float("inf"), float("-inf"), float("nan"), 16777217.0, -0.0, 7.0):
        for dtype in (F32, F64, torch.bfloat16):
            got = run(pointwise(lambda t: Const(dtype, value), [F32], dtype, 1), {"x0": torch.zeros(1)})["y"]  # noqa: B023
            torch.testing.assert_close(
                got, torch.tensor([value], dtype=dtype), rtol=0, atol=0, equal_nan=True
            )
    for whole in (-(2**63), 2**63 - 1, -5, 2**31):
        got = run(pointwise(lambda t: Const(I64, whole), [F32], I64, 1), {"x0": torch.zeros(1)})["y"]  # noqa: B023
        assert got.item() == whole
    got = run(
        pointwise(lambda t: IndexValue(F32, 3 * axis_symbol("i") + 1), [F32], F32, 9), {"x0": torch.zeros(9)}
    )["y"]
    assert torch.equal(got, torch.arange(9) * 3.0 + 1)


def test_long_chains_of_operations() -> None:
    def chain(t):  # type: ignore[no-untyped-def]
        term = t[0]
        for number in range(600):
            term = op("add", op("mul", term, Const(F32, 0.5)), t[number % 2])
        return term

    x, y = torch.randn(20), torch.randn(20)
    want = x
    for number in range(600):
        want = want * 0.5 + (x, y)[number % 2]
    torch.testing.assert_close(run(pointwise(chain, [F32, F32], F32, 20), {"x0": x, "x1": y})["y"], want)
