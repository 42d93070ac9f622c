"""Each kind of fusion in the smallest program that it is for: it fires, kernels get fewer, numbers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.pipeline.stages import Judge, compile_stages, run_compiled, run_interpreted, traced

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
W = torch.randn(24, 16, generator=torch.Generator().manual_seed(2)) / 4
V = torch.randn(24, 16, generator=torch.Generator().manual_seed(3)) / 4

#: fusion pass -> (program, inputs, kernels after all fusions)
PROGRAMS: dict[str, tuple[str, Callable[..., object], tuple[Tensor, ...], int]] = {
    "chain of pointwise work": ("fuse_vertical", lambda x: torch.tanh(torch.relu(x) * 2 + 1), (X,), 1),
    "norm into a linear": ("fuse_vertical", lambda x, w: F.linear(F.rms_norm(x, (16,)), w), (X, W), 1),
    "activation after a linear": ("fuse_vertical", lambda x, w: F.gelu(F.linear(x, w)), (X, W), 1),
    "residual after a linear": ("fuse_vertical", lambda x, w: x + F.linear(x, w[:16]).tanh(), (X, W), 1),
    "two linears of one input": (
        "fuse_input",
        lambda x, w, v: (F.linear(x, w), F.linear(x, v)),
        (X, W, V),
        1,
    ),
    "gate and up": ("fuse_input", lambda x, w, v: F.silu(F.linear(x, w)) * F.linear(x, v), (X, W, V), 1),
    "statistics of one tensor": ("fuse_input", lambda x: (x.sum(1), x.amax(1), (x * x).sum(1)), (X,), 1),
    "sum of two linears": (
        "fuse_output",
        lambda x, y, w, v: F.linear(x, w) + F.linear(y, v),
        (X, X + 1, W, V),
        1,
    ),
    "concatenation of linears": (
        "fuse_output",
        lambda x, y, w, v: torch.cat((F.linear(x, w), F.linear(y, v)), 1),
        (X, X + 1, W, V),
        1,
    ),
    "work on keys and on values": (
        "fuse_horizontal",
        lambda x, w, v: F.scaled_dot_product_attention(
            x[None, None], w[None, None].exp(), v[None, None].cos()
        ),
        (X, W, V),
        2,
    ),
}
#: The product of the two linears is a consumer of both: vertical fusion finds the same kernel.
ALSO_VERTICAL = frozenset({"gate and up"})


@pytest.mark.parametrize("name", PROGRAMS)
def test_fires_and_keeps_the_numbers(name: str) -> None:
    fusion, function, inputs, kernels = PROGRAMS[name]
    program = traced(function, inputs)
    judge = Judge(program, inputs, name, lambda: str(program.graph))
    stages = compile_stages(program, judge)
    assert stages.applied()[fusion] > 0
    assert len(stages.built.plan.launches()) == kernels
    judge.stage("interpreter", lambda *flat: run_interpreted(stages.built, flat))
    judge.accept("c++", run_compiled([stages.built], [inputs])[0])


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in ALSO_VERTICAL])
def test_without_it_there_are_more_kernels(name: str) -> None:
    """The pass that the program is for is what joins its kernels: no other one does the same."""
    fusion, function, inputs, kernels = PROGRAMS[name]
    program = traced(function, inputs)
    judge = Judge(program, inputs, name, lambda: str(program.graph))
    assert len(compile_stages(program, judge, skip=frozenset({fusion})).built.plan.launches()) > kernels


def test_a_matmul_is_not_recomputed_for_a_reduction_of_its_result() -> None:
    program = traced(lambda x, w: F.linear(x, w).softmax(1), (X, W))
    stages = compile_stages(program, Judge(program, (X, W), "softmax", lambda: ""))
    assert len(stages.built.plan.launches()) == 2
    assert any("matmul" in record.reason for p in stages.ledger.passes for record in p.refused)
