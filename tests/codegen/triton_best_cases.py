"""Run searches of products in Triton's interpreter on drawn shapes; `python -m tests.codegen.triton_best_cases FOLDER`.

One JSON line per property.  A process of its own, as for triton_cases.  Operands are small whole numbers, so sums are
exact in any order, and equal scores are frequent.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import sympy
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.triton_cases import B, axis, load_printed
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import Bind, Buffer, Kernel, MatmulPart, Schedule, Store
from torchweld.codegen.triton import build_triton
from torchweld.graph.terms import Const, Contract, Expr, Fold, Load, Monoid, Ref, Term, cast, op

F32, I64 = torch.float32, torch.int64
INF, NAN = float("inf"), float("nan")
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
NUMBERS = itertools.count()
TILES = Schedule(block_rows=16, block_n=16, block_k=16, warps=4, stages=1)


@dataclass(frozen=True)
class Shape:
    """scores [2, rows, columns] (or [rows, columns]) of `dtype`; count: entries per row, 0 for one without an axis."""

    rows: int
    columns: int
    depth: int
    count: int
    dtype: torch.dtype
    is_batched: bool


SHAPES = st.builds(
    Shape, st.integers(1, 40), st.integers(1, 70), st.integers(1, 20), st.integers(0, 8),
    st.sampled_from([F32, torch.bfloat16]), st.booleans(),
).filter(lambda shape: shape.count <= shape.columns)  # fmt: skip


def search_kernel(shape: Shape, score: Callable[[Term, Term], Term], schedule: Schedule = TILES) -> Kernel:
    """The greatest of score(products, bias) per row and their places."""
    batch = (axis("b", 2),) if shape.is_batched else ()
    m, n, k, r = axis("m", B), axis("n", shape.columns), axis("k", shape.depth), axis("r", shape.count)
    outer = tuple(a.symbol for a in batch)
    a, b = (cast(Load(shape.dtype, t, (*outer, i.symbol, k.symbol)), F32) for t, i in (("x", m), ("w", n)))
    body = score(Ref(F32, "acc"), Load(F32, "bias", (n.symbol,)))
    body = body if shape.dtype == F32 else cast(body, shape.dtype)
    rank = r.symbol if shape.count else None
    choices = (
        Bind("top", Fold(body.dtype, Monoid("max"), (n,), body, rank)),
        Bind("place", Fold(I64, Monoid("argmax"), (n,), body, rank)),
    )
    ranks = (r,) if shape.count else ()
    index = (*outer, m.symbol, *(a.symbol for a in ranks))
    stores = tuple(Store(f"{bind.name}_out", index, Ref(bind.term.dtype, bind.name)) for bind in choices)
    contract = Bind("acc", Contract(F32, k, a, b))
    part = MatmulPart(batch, (m,), n, (), (contract,), stores, schedule, choices, ranks)
    lead: tuple[Expr, ...] = tuple(a.extent for a in batch)
    out = (*lead, B, *(a.extent for a in ranks))
    buffers = (
        Buffer("x", shape.dtype, (*lead, B, k.extent), "input"),
        Buffer("w", shape.dtype, (*lead, n.extent, k.extent), "weight"),
        Buffer("bias", F32, (n.extent,), "weight"),
        Buffer("top_out", body.dtype, out, "output"),
        Buffer("place_out", I64, out, "output"),
    )
    return Kernel("search", buffers, ("B",), (part,))


def storing(kernel: Kernel) -> Kernel:
    """The kernel that stores the scores which `kernel` searches."""
    (part,) = kernel.parts
    assert isinstance(part, MatmulPart)
    fold = part.choices[0].term
    assert isinstance(fold, Fold)
    axes = (*part.batch, *part.rows, part.n)
    store = Store("scores", tuple(a.symbol for a in axes), fold.body)
    scores = Buffer("scores", fold.dtype, tuple(sympy.sympify(a.extent) for a in axes), "output")
    plain = replace(part, stores=(store,), choices=(), ranks=())
    return Kernel("stores", (*kernel.buffers[:3], scores), ("B",), (plain,))


def launch(kernel: Kernel, tensors: dict[str, Tensor], rows: int) -> list[Tensor]:
    path = FOLDER / f"{kernel.name}_{next(NUMBERS)}.py"
    module = load_printed(path, build_triton(kernel))
    found: list[Tensor] = module.launch(
        *(tensors[b.name] for b in kernel.buffers if b.role != "output"), B=rows
    )
    return found


def numbers(kernel: Kernel, shape: Shape, special: float, seed: int) -> dict[str, Tensor]:
    """Whole numbers; `special` in a row of x and in some entries of the bias, zeros in another row."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for buffer in kernel.buffers[:3]:
        extents = [int(e.subs({B: shape.rows})) for e in buffer.shape]
        tensors[buffer.name] = torch.randint(-2, 3, extents, generator=generator).to(buffer.dtype)
    tensors["x"][..., seed % shape.rows, :] = 0
    tensors["x"][..., seed // 7 % shape.rows, :] = special
    tensors["bias"][torch.rand(shape.columns, generator=generator) < (seed % 5) / 4] = special
    return tensors


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()), (got, want)
    assert torch.equal(got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0)), (got, want)


PHASES = (Phase.explicit, Phase.generate)  # to shrink a failure takes minutes here
SPECIAL = st.sampled_from([0.0, NAN, INF, -INF])


@settings(max_examples=25, deadline=None, database=None, derandomize=True, phases=PHASES)
@given(SHAPES, SPECIAL, st.integers(0, 1 << 16))
def as_the_interpreter(shape: Shape, special: float, seed: int) -> None:
    """A bias epilogue: the reference interpreter's choice, bit for bit."""
    kernel = search_kernel(shape, lambda acc, bias: op("add", acc, bias))
    tensors = numbers(kernel, shape, special, seed)
    wanted = interpret(kernel, tensors, {"B": shape.rows})
    for got, want in zip(launch(kernel, tensors, shape.rows), wanted.values(), strict=True):
        assert_same(got, want)


@settings(max_examples=10, deadline=None, database=None, derandomize=True, phases=PHASES)
@given(SHAPES, SPECIAL, st.integers(0, 1 << 16))
def as_the_stored_scores(shape: Shape, special: float, seed: int) -> None:
    """A soft cap, which makes large scores equal: the order that torch's stable sort gives the stored scores."""

    def capped(acc: Term, bias: Term) -> Term:
        return op("mul", op("tanh", op("add", acc, bias)), Const(F32, 3.0))

    kernel = search_kernel(shape, capped)
    tensors = numbers(kernel, shape, special, seed)
    (scores,) = launch(storing(kernel), tensors, shape.rows)
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    top, place = launch(kernel, tensors, shape.rows)
    entries = slice(shape.count) if shape.count else 0
    assert_same(top, values[..., entries])
    assert_same(place, places[..., entries])


def with_the_usual_tiles() -> None:
    """Columns over more than one tile of the schedule that GPUs get, the best ones in the last tile."""
    shape = Shape(17, 300, 70, 5, F32, False)
    kernel = search_kernel(shape, lambda acc, bias: op("add", acc, bias), Schedule())
    tensors = numbers(kernel, shape, -INF, 3)
    tensors["bias"] = torch.arange(300.0) * 1000
    wanted = interpret(kernel, tensors, {"B": 17})
    assert int((wanted["place_out"] > 256).sum()) > 0, "nothing is found in the last tile"
    for got, want in zip(launch(kernel, tensors, 17), wanted.values(), strict=True):
        assert_same(got, want)


PROPERTIES = (as_the_interpreter, as_the_stored_scores, with_the_usual_tiles)

if __name__ == "__main__":
    for run in PROPERTIES:
        try:
            run()
            problem = None
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:2000]
        print(json.dumps({"case": run.__name__, "problem": problem}), flush=True)
