"""The reference interpreter gives the numbers of the torch formula that each hand-written kernel states."""

from __future__ import annotations

import pytest
import torch
from sympy import Integer
from torch import Tensor

from tests import kernels_by_hand as by_hand
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.interpreter_ops import POINTWISE
from torchweld.codegen.ir import Bind, Buffer, Kernel, RowPart, Store, size_symbol
from torchweld.graph.formats import get_format
from torchweld.graph.ops.attention import attention_reference
from torchweld.graph.terms import OPS, Axis, Const, Fold, Guard, IndexValue, Load, Monoid, Ref, Term, cast, op

F32 = torch.float32
SIZES = [{"B": b, "S": s} for b, s in ((0, 3), (2, 0), (1, 1), (2, 7), (3, 1), (1, 13))]


def make_buffers(kernel: Kernel, sizes: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    buffers = {}
    for b in kernel.buffers:
        shape = [int(e.subs({s: sizes[str(s)] for s in e.free_symbols})) for e in b.shape]
        if b.role == "output":
            continue
        if b.format is not None:
            buffers[b.name] = stored_rows(b.format, shape, generator)
        elif b.dtype == torch.bool:
            buffers[b.name] = torch.rand(shape, generator=generator) > 0.4
        elif b.dtype.is_floating_point:
            buffers[b.name] = torch.randn(shape, generator=generator).to(b.dtype)
        else:
            buffers[b.name] = torch.randint(-11, 11, shape, generator=generator).to(b.dtype)
    return buffers


def stored_rows(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    """Random bytes with scales that are small and finite."""
    stored = get_format(name)
    data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    blocks = data.reshape(-1, stored.block_bytes)
    for at in stored.scales:
        scale = (torch.rand(len(blocks), 1, generator=generator) * 0.02 + 0.001).to(torch.float16)
        blocks[:, at : at + 2] = scale.view(torch.uint8)
    return blocks.reshape(shape)


def expected(name: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    match name.split("_")[0]:
        case "add":
            return {"y": torch.relu(x["x"] + x["bias"])}
        case "rms":
            normed = torch.nn.functional.rms_norm(x["x"], x["w"].shape, x["w"], 1e-6)
            return {"y": normed, "twice": x["x"] * 2}
        case "softmax":
            return {"p": x["x"].softmax(-1), "i": x["z"].argmax(-1)}
        case "gather":
            return {"y": torch.cat([x["table"][x["ids"]], -x["x"]], -1)}
        case "norm":
            gate, up = x["gate"], x["up"]
            if gate.dtype == torch.uint8:
                gate, up = (get_format("Q8_0").decode_rows(w, 64) for w in (gate, up))
            n = torch.nn.functional.rms_norm(x["x"], x["w"].shape, x["w"], 1e-6)
            return {"y": torch.nn.functional.silu(n @ gate.T) * (n @ up.T) + x["r"]}
        case "bmm":
            e = x["x"][0] @ x["f"].T + x["bias"] if len(x["x"]) else torch.empty(0)
            return {"c": x["x"] @ x["y"], "e": e}
        case _:
            return {"o": attention_expected(name, x)}


def attention_expected(name: str, x: dict[str, Tensor]) -> Tensor:
    kind = name.split("_")[1] if "mask" not in name else "none"
    q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (x["q"], x["k"], x["v"]))
    cap = 5.0 if "soft" in name else 0.0
    out = attention_reference(q, k, v, x.get("mask"), kind, 3, 16**-0.5, cap)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", by_hand.ALL)
def test_matches_torch(name: str, sizes: dict[str, int]) -> None:
    kernel = by_hand.ALL[name]()
    sizes = {n: sizes[n] for n in kernel.sizes}
    if name == "bmm_linear" and sizes["B"] == 0:
        pytest.skip("reads x[0], which does not exist")
    buffers = make_buffers(kernel, sizes)
    got, want = interpret(kernel, buffers, sizes), expected(name, buffers)
    assert got.keys() == want.keys()
    for out, value in got.items():
        torch.testing.assert_close(value, want[out], rtol=2e-5, atol=2e-5)
    exact = interpret(kernel, buffers, sizes, precision=torch.float64)
    for out, value in exact.items():
        assert value.dtype == (torch.float64 if got[out].is_floating_point() else got[out].dtype)
        torch.testing.assert_close(value, want[out].to(value.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_results_round_to_nearest_even(dtype: torch.dtype) -> None:
    kernel = by_hand.add_relu_broadcast(dtype)
    buffers = make_buffers(kernel, {"B": 2, "S": 3})
    got = interpret(kernel, buffers, {"B": 2, "S": 3})["y"]
    assert torch.equal(got, torch.relu(buffers["x"].float() + buffers["bias"]).to(dtype))


def pointwise_kernel(term: Term, out: torch.dtype, inputs: dict[str, torch.dtype]) -> Kernel:
    n = size_symbol("N")
    buffers = [Buffer(name, dtype, (n,), "input") for name, dtype in inputs.items()]
    part = RowPart((Axis("i", n),), (), (), (Store("y", (Axis("i", n).symbol,), term),))
    return Kernel("pointwise", (*buffers, Buffer("y", out, (n,), "output")), ("N",), (part,))


def at(name: str, dtype: torch.dtype) -> Load:
    return Load(dtype, name, (Axis("i", size_symbol("N")).symbol,))


def test_every_operation_has_a_meaning() -> None:
    assert set(POINTWISE) | {"cast", "bitcast"} == set(OPS)


@pytest.mark.parametrize(
    ("name", "a", "b", "want"),
    [
        ("floordiv", [7, -7, 7, -7], [2, 2, -2, -2], [3, -4, -4, 3]),
        ("mod", [7, -7, 7, -7], [2, 2, -2, -2], [1, 1, -1, -1]),
        ("max", [1, 5, 3, 0], [2, 2, 3, -1], [2, 5, 3, 0]),
        ("shl", [1, 2, 3, 255], [1, 2, 3, 4], [2, 8, 24, 4080]),
        ("shr", [-8, 8, 7, 1], [1, 1, 1, 1], [-4, 4, 3, 0]),
    ],
)
def test_integer_operations(name: str, a: list[int], b: list[int], want: list[int]) -> None:
    dtype = torch.int32
    kernel = pointwise_kernel(op(name, at("a", dtype), at("b", dtype)), dtype, {"a": dtype, "b": dtype})
    tensors = {"a": torch.tensor(a, dtype=dtype), "b": torch.tensor(b, dtype=dtype)}
    assert interpret(kernel, tensors, {"N": 4})["y"].tolist() == want


def test_unsigned_wraps_and_bitcasts() -> None:
    low, high = (cast(at(n, torch.uint8), torch.uint16) for n in "ab")
    word = op("or", low, op("shl", high, Const(torch.uint16, 8)))
    value = op("bitcast", word, dtype=torch.float16)
    kernel = pointwise_kernel(cast(value, F32), F32, {"a": torch.uint8, "b": torch.uint8})
    halves = torch.tensor([1.5, -2.25, 0.0, 65504.0], dtype=torch.float16)
    pairs = halves.view(torch.uint8).reshape(-1, 2)
    got = interpret(kernel, {"a": pairs[:, 0].contiguous(), "b": pairs[:, 1].contiguous()}, {"N": 4})["y"]
    assert torch.equal(got, halves.float())
    more = op("add", at("a", torch.uint8), Const(torch.uint8, 250))
    wrapped = pointwise_kernel(more, torch.uint8, {"a": torch.uint8})
    assert interpret(wrapped, {"a": torch.tensor([10], dtype=torch.uint8)}, {"N": 1})["y"].tolist() == [4]


@pytest.mark.parametrize(
    ("kind", "empty"), [("sum", 0.0), ("prod", 1.0), ("max", -torch.inf), ("min", torch.inf)]
)
def test_folds_over_nothing_give_the_identity(kind: str, empty: float) -> None:
    n = size_symbol("N")
    r, k = Axis("r", Integer(2)), Axis("k", n)
    fold = Fold(F32, Monoid(kind), (k,), Load(F32, "x", (r.symbol, k.symbol)))  # type: ignore[arg-type]
    part = RowPart((r,), (), (Bind("f", fold),), (Store("y", (r.symbol,), Ref(F32, "f")),))
    shape = (Integer(2), n)
    buffers = (Buffer("x", F32, shape, "input"), Buffer("y", F32, (Integer(2),), "output"))
    kernel = Kernel("fold", buffers, ("N",), (part,))
    assert interpret(kernel, {"x": torch.empty(2, 0)}, {"N": 0})["y"].tolist() == [empty, empty]
    x = torch.tensor([[1.0, torch.nan, 2.0], [3.0, -1.0, 0.5]])
    want = {"sum": x.sum(-1), "prod": x.prod(-1), "max": x.amax(-1), "min": x.amin(-1)}[kind]
    torch.testing.assert_close(interpret(kernel, {"x": x}, {"N": 3})["y"], want, equal_nan=True)


def test_fold_over_two_axes_of_a_constant_counts_them() -> None:
    n = size_symbol("N")
    r, k, j = Axis("r", Integer(2)), Axis("k", n), Axis("j", Integer(3))
    fold = Fold(F32, Monoid("sum"), (k, j), Const(F32, 1.0))
    part = RowPart((r,), (), (Bind("f", fold),), (Store("y", (r.symbol,), Ref(F32, "f")),))
    kernel = Kernel("count", (Buffer("y", F32, (Integer(2),), "output"),), ("N",), (part,))
    assert interpret(kernel, {}, {"N": 5})["y"].tolist() == [15.0, 15.0]


def test_guarded_load_may_lie_outside_and_an_unguarded_one_raises() -> None:
    n = size_symbol("N")
    i = Axis("i", n).symbol
    earlier = Load(F32, "x", (i - 1,))
    inside = op("gt", IndexValue(torch.int64, i), Const(torch.int64, 0))
    kernel = pointwise_kernel(Guard(F32, inside, earlier, Const(F32, -1.0)), F32, {"x": F32})
    x = torch.arange(4.0)
    assert interpret(kernel, {"x": x}, {"N": 4})["y"].tolist() == [-1.0, 0.0, 1.0, 2.0]
    with pytest.raises(IndexError, match="outside buffer 'x'"):
        interpret(pointwise_kernel(earlier, F32, {"x": F32}), {"x": x}, {"N": 4})


def test_bad_indirect_index_raises() -> None:
    kernel = by_hand.gather_and_concat()
    buffers = make_buffers(kernel, {"B": 3})
    buffers["ids"] = torch.tensor([0, 11, 1])
    with pytest.raises(IndexError, match="index 11 is out of range for 11 rows"):
        interpret(kernel, buffers, {"B": 3})


def test_wrong_buffer_is_named() -> None:
    kernel = by_hand.add_relu_broadcast()
    buffers = make_buffers(kernel, {"B": 1, "S": 2})
    with pytest.raises(ValueError, match=r"input 'x': expected torch\.float32"):
        interpret(kernel, {**buffers, "x": buffers["x"].double()}, {"B": 1, "S": 2})
    with pytest.raises(KeyError, match="no tensor given for its weight 'bias'"):
        interpret(kernel, {"x": buffers["x"]}, {"B": 1, "S": 2})


def test_a_row_that_sees_nothing_gives_zero() -> None:
    kernel = by_hand.attention("none", tensor_mask=True)
    sizes = {"B": 1, "S": 3}
    buffers = make_buffers(kernel, sizes)
    buffers["mask"][:, :, 1] = False
    out = interpret(kernel, buffers, sizes)["o"]
    assert (out[0, 1] == 0).all()
    assert (out[0, 2] != 0).all() == buffers["mask"][0, 0, 2].any()
