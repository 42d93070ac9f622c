"""Attention sinks without a cache: every way to run them against a softmax written by hand, and what must not matter.

With a cache they are tested beside everything else of it, in test_cached_attention.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.cached_cases import symbolic_graph
from tests.codegen.cpp_cases import plan_of, same_bits
from torchweld.codegen.cpp_fingerprint import fingerprint
from torchweld.codegen.executable import Executable
from torchweld.codegen.formula import formula
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import AttentionPart, Kernel
from torchweld.codegen.lower import LoweredGroup, lower_group
from torchweld.codegen.plan_inputs import bind_sizes
from torchweld.codegen.plan_json import plan_from_json, plan_to_json
from torchweld.codegen.reference import group_reference
from torchweld.graph.groups import Group
from torchweld.graph.terms import Attend, Sharing

ops = torch.ops.torchweld
HEADS, SIZE, WIDTH = 6, 16, 24


@dataclass(frozen=True)
class Problem:
    """One kind of call; the lengths are symbols. mask is "", "bool" or "float"."""

    key_heads: int = 2
    kind: str = "causal"
    window: int = 0
    mask: str = ""
    soft_cap: float = 0.0
    dtype: torch.dtype = torch.float32
    sunk: bool = True

    def call(self, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        """The operation on (query, key, value, mask?, sinks?)."""
        mask, sinks = (rest[0] if self.mask else None), (rest[-1] if self.sunk else None)
        result: Tensor = ops.attention(q, k, v, mask, self.kind, self.window, 0.3, self.soft_cap, sinks)
        return result

    def tensors(self, batch: int, queries: int, keys: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs, among the sinks one that outweighs everything and one that weighs nothing."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        parts = [draw(batch, HEADS, queries, SIZE), draw(batch, self.key_heads, keys, SIZE)]
        parts.append(draw(batch, self.key_heads, keys, WIDTH))
        if self.mask:
            visible = torch.rand(batch, 1, queries, keys, generator=generator) > 0.4
            parts.append(visible if self.mask == "bool" else draw(batch, 1, queries, keys))
        sinks = 2 * draw(HEADS)
        sinks[0], sinks[1] = 30.0, -math.inf
        return (*parts, sinks) if self.sunk else tuple(parts)


PROBLEMS = (
    Problem(),
    Problem(6, "none", mask="float", soft_cap=2.0),
    Problem(1, "window", 70),
    Problem(2, "causal", mask="bool"),
)


def by_hand(problem: Problem, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    """In float64: the sink as one more key with a value of zeros."""
    q, k, v, *rest = (part if part.dtype == torch.bool else part.double() for part in (q, k, v, *rest))  # type: ignore[assignment]
    k, v = (part.repeat_interleave(HEADS // problem.key_heads, 1) for part in (k, v))
    scores = q @ k.mT * 0.3
    if problem.soft_cap:
        scores = problem.soft_cap * torch.tanh(scores / problem.soft_cap)
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
    hidden = torch.zeros_like(distance, dtype=torch.bool) if problem.kind == "none" else distance < 0
    if problem.kind == "window":
        hidden = hidden | (distance >= problem.window)
    scores = scores.masked_fill(hidden, -math.inf)
    if problem.mask == "bool":
        scores = scores.masked_fill(~rest[0], -math.inf)
    elif problem.mask:
        scores = scores + rest[0]
    sink = rest[-1].view(1, HEADS, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1).nan_to_num(0.0)  # nothing visible, and no sink
    return weights @ torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)


@functools.cache
def lowered(problem: Problem) -> tuple[Kernel, str]:
    """The kernel for any batch and lengths, and its reference as a dump has it."""
    dims = {0: (0, 2), 1: (0, 2), 2: (0, 2), **({3: (0, 2, 3)} if problem.mask else {})}
    module = symbolic_graph(problem.call, problem.tensors(3, 5, 11), dims)
    (node,) = module.graph.find_nodes(op="call_function", target=ops.attention.default)
    group = Group(0, (node,))
    result = lower_group(group, cores=2)
    assert isinstance(result, LoweredGroup)
    return result.kernel, group_reference(group, result)


@functools.cache
def executable(problem: Problem, threads: int) -> Executable:
    return Executable(plan_of(lowered(problem)[0]), threads=threads)


def compiled(problem: Problem, tensors: tuple[Tensor, ...], threads: int = 1) -> Tensor:
    (result,) = executable(problem, threads)(*tensors)
    return result


def interpreted(problem: Problem, tensors: tuple[Tensor, ...]) -> Tensor:
    kernel, _ = lowered(problem)
    names = [buffer.name for buffer in kernel.buffers if not buffer.is_written]
    sizes = bind_sizes(plan_of(kernel), [tuple(tensor.shape) for tensor in tensors])
    (result,) = interpret(kernel, dict(zip(names, tensors, strict=True)), sizes).values()
    return result


@settings(max_examples=25, deadline=None)
@given(
    problem=st.sampled_from(PROBLEMS), batch=st.integers(1, 2), queries=st.integers(1, 20),
    more=st.one_of(st.integers(-3, 12), st.sampled_from([63, 64, 120, 128, 260])), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_way_to_run_it_equals_a_softmax_with_one_more_key(
    problem: Problem, batch: int, queries: int, more: int, seed: int
) -> None:
    """With fewer keys than queries the first rows see nothing: they give 0."""
    tensors = problem.tensors(batch, queries, max(queries + more, 1), seed)
    expected = by_hand(problem, *tensors)
    near = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(compiled(problem, tensors), expected, **near)
    torch.testing.assert_close(interpreted(problem, tensors), expected, **near)
    wide = tuple(part if part.dtype == torch.bool else part.double() for part in tensors)
    torch.testing.assert_close(problem.call(*wide), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype)
    tensors = problem.tensors(2, 9, 70)
    loose = {torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for result in (compiled(problem, tensors), interpreted(problem, tensors), problem.call(*tensors)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), by_hand(problem, *tensors), rtol=loose, atol=loose)


def test_a_row_that_sees_nothing_gives_zero() -> None:
    problem = PROBLEMS[3]
    q, k, v, mask, sinks = problem.tensors(1, 4, 9)
    mask[:, :, 2] = False
    for result in (compiled(problem, (q, k, v, mask, sinks)), interpreted(problem, (q, k, v, mask, sinks))):
        assert (result[:, :, 2] == 0).all() and (result[:, 1, [0, 1, 3]] != 0).any(-1).all()


def test_a_sink_of_nothing_is_none() -> None:
    *tensors, sinks = Problem().tensors(2, 7, 200)
    nothing = (*tensors, torch.full_like(sinks, -math.inf))
    without = Problem(sunk=False)
    torch.testing.assert_close(
        compiled(Problem(), nothing), compiled(without, tuple(tensors)), rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[2]])
def test_a_row_has_the_same_bits_alone_and_with_any_threads(problem: Problem) -> None:
    q, k, v, sinks = problem.tensors(1, 40, 300)
    whole = compiled(problem, (q, k, v, sinks))
    for threads in (2, 3):
        assert same_bits(compiled(problem, (q, k, v, sinks), threads), whole)
    for count in range(1, 17):
        for first in (0, 40 - count):
            keys = 260 + first + count  # the last of these rows sees them all
            part = (q[:, :, first : first + count].contiguous(), k[:, :, :keys].contiguous())
            result = compiled(problem, (*part, v[:, :, :keys].contiguous(), sinks), 1 + count % 3)
            assert same_bits(result, whole[:, :, first : first + count].contiguous()), count


def test_a_kernel_with_sinks_is_told_apart_and_comes_back_from_a_file() -> None:
    kernel, reference = lowered(Problem())
    without, _ = lowered(Problem(sunk=False))
    (part,) = kernel.parts
    assert isinstance(part, AttentionPart) and isinstance(part.attend.term, Attend)
    attend = part.attend.term
    assert attend.sinks is not None and any("sink" in line for line in formula(kernel))
    assert fingerprint(kernel, {}) != fingerprint(without, {})
    assert not any("sink" in line for line in formula(without))
    assert Sharing()(attend) is attend
    share = Sharing()
    assert share(attend) is not share(replace(attend, sinks=None)) and share(replace(attend)) is share(attend)
    tensors = Problem().tensors(1, 5, 140)
    again = plan_from_json(plan_to_json(plan_of(kernel), lambda tensor: ""), {})
    assert same_bits(Executable(again, threads=1)(*tensors)[0], compiled(Problem(), tensors))
    names: dict[str, object] = {"torch": torch}
    exec(reference, names)
    sizes = bind_sizes(plan_of(kernel), [tuple(tensor.shape) for tensor in tensors])
    (result,) = names["reference"](*tensors, *(sizes[name] for name in kernel.sizes))  # type: ignore[operator]
    torch.testing.assert_close(result, Problem().call(*tensors), rtol=0, atol=0)
