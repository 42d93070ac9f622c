"""Attention with products in bfloat16: within the rounding of its factors, exact in what rows see, rows independent."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.cpp_cases import plan_of, random_buffers, same_bits
from tests.kernels_by_hand import attention
from torchweld.codegen.executable import Executable

KINDS = (("none", 0), ("causal", 0), ("window", 70))
SHAPES = ((4, 2, 32), (3, 1, 64), (2, 2, 16))  # heads, key heads, width; the last one is too narrow for tiles


@functools.cache
def built(kind: tuple[str, int], shape: tuple[int, int, int], soft_cap: float, masked: bool) -> Executable:
    """The kernel of one case with precision bf16."""
    heads, groups, width = shape
    kernel = attention(*kind, soft_cap=soft_cap, tensor_mask=masked, heads=heads, groups=groups, width=width)
    return Executable(plan_of(kernel), threads=2, precision="bf16")


def draw(shape: tuple[int, int, int], length: int, seed: int, masked: bool = False) -> list[Tensor]:
    """q, k, v of two sequences, and a mask that shows each query at least its own position."""
    heads, groups, width = shape
    kernel = attention("none", tensor_mask=masked, heads=heads, groups=groups, width=width)
    buffers = random_buffers(kernel, {"B": 2, "S": length}, seed)
    if masked:
        buffers["mask"] |= torch.eye(length, dtype=torch.bool)
    return list(buffers.values())


def reference(
    kind: tuple[str, int], shape: tuple[int, int, int], soft_cap: float, inputs: list[Tensor]
) -> Tensor:
    """The same in float64: [B, S, heads * width]."""
    heads, groups, width = shape
    q, k, v = (t.double().reshape(*t.shape[:2], -1, width).transpose(1, 2) for t in inputs[:3])
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * width**-0.5
    scores = soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores
    length = q.shape[2]
    place = torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool)
    if kind[0] != "none":
        seen = place[None] <= place[:, None]
    if kind[0] == "window":
        seen &= place[None] > place[:, None] - kind[1]
    if len(inputs) > 3:
        seen = seen & inputs[3]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    result: Tensor = (weights @ v).transpose(1, 2).flatten(-2)
    return result


@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from(KINDS), shape=st.sampled_from(SHAPES), length=st.integers(1, 200), seed=st.integers(0, 9),
    case=st.sampled_from([(0.0, False), (5.0, False), (0.0, True)]),
)  # fmt: skip
def test_error_is_that_of_rounded_factors(
    kind: tuple[str, int], shape: tuple[int, int, int], length: int, seed: int, case: tuple[float, bool]
) -> None:
    inputs = draw(shape, length, seed, case[1])
    (got,) = built(kind, shape, *case)(*inputs)
    want = reference(kind, shape, case[0], inputs)
    # A score is off by 2^-8 of the sum of the sizes of its products, about 6 times 2^-8 here, and so is a weight.
    scale = float(inputs[2].abs().max())
    assert float((got.double() - want).abs().max()) < 0.05 * scale
    assert float((got.double() - want).square().mean().sqrt()) < 0.005 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_others(kind: tuple[str, int]) -> None:
    shape = SHAPES[0]
    inputs = draw(shape, 200, 0)
    executable = built(kind, shape, 0.0, False)
    (whole,) = executable(*inputs)
    if kind[0] == "none":
        (got,) = executable(*(t[1:] for t in inputs))
        assert same_bits(got, whole[1:].contiguous())
        return
    for length in (17, 63, 64, 65, 129, 199):
        (got,) = executable(*(t[:, :length] for t in inputs))
        assert same_bits(got, whole[:, :length].contiguous()), length


@pytest.mark.parametrize("count", [1, 16])
def test_few_queries_are_exact(count: int) -> None:
    inputs = draw(SHAPES[0], count, 1)
    (got,) = built(KINDS[1], SHAPES[0], 0.0, False)(*inputs)
    want = reference(KINDS[1], SHAPES[0], 0.0, inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_later_keys_may_hold_nan() -> None:
    inputs = draw(SHAPES[0], 150, 2)
    executable = built(KINDS[1], SHAPES[0], 0.0, False)
    (clean,) = executable(*inputs)
    for tensor in inputs[1:]:
        tensor[:, 100:] = torch.nan
    (dirty,) = executable(*inputs)
    assert same_bits(dirty[:, :100].contiguous(), clean[:, :100].contiguous())
    assert dirty[:, 100:].isnan().all()
