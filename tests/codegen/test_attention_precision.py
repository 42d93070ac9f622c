"""Attention with products in bfloat16: within the rounding of its factors, exact in what rows see, rows independent."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.cached_cases import Problem, kernel_of, make_call
from tests.codegen.cpp_cases import plan_of, random_buffers, same_bits
from tests.kernels_by_hand import attention
from torchweld.codegen.executable import Executable

KINDS = (("none", 0), ("causal", 0), ("window", 70))
SHAPES = ((4, 2, 32), (3, 1, 64), (2, 2, 16))  # heads, key heads, width; the last one is too narrow for tiles
#: kind, shape, soft cap, whether there is a mask
CASES = (
    (KINDS[0], SHAPES[0], 0.0, False), (KINDS[0], SHAPES[1], 5.0, True), (KINDS[1], SHAPES[0], 0.0, False),
    (KINDS[2], SHAPES[0], 0.0, False), (KINDS[1], SHAPES[2], 0.0, False),
)  # fmt: skip
#: Over a cache: 48 features are no whole pair of tiles; a ring of slots that keys leave behind a window.
CACHED = (Problem(3, 1, 32, 48), Problem(4, 2, 64, 32, window=130, sinks=True))


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


@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(CASES), length=st.integers(1, 200), seed=st.integers(0, 9))
def test_error_is_that_of_rounded_factors(
    case: tuple[tuple[str, int], tuple[int, int, int], float, bool], length: int, seed: int
) -> None:
    kind, shape, soft_cap, masked = case
    inputs = draw(shape, length, seed, masked)
    (got,) = built(kind, shape, soft_cap, masked)(*inputs)
    assert_near(got, reference(kind, shape, soft_cap, inputs), float(inputs[2].abs().max()))


def assert_near(got: Tensor, want: Tensor, scale: float) -> None:
    """A score is off by 2^-8 of the sum of the sizes of its products, about 6 times 2^-8 here, and so is a weight."""
    assert float((got.double() - want).abs().max()) < 0.05 * scale
    assert float((got.double() - want).square().mean().sqrt()) < 0.005 * scale


@functools.cache
def cached(problem: Problem) -> Executable:
    """The kernel over a cache with precision bf16."""
    return Executable(plan_of(kernel_of(problem)), threads=2, precision="bf16")


@settings(max_examples=20, deadline=None)
@given(
    problem=st.sampled_from(CACHED), past=st.lists(st.integers(0, 300), min_size=1, max_size=2),
    count=st.integers(17, 150), spare=st.integers(0, 70), seed=st.integers(0, 9), data=st.data(),
)  # fmt: skip
def test_rows_over_a_cache_are_near_and_do_not_depend_on_others(
    problem: Problem, past: list[int], count: int, spare: int, seed: int, data: st.DataObject
) -> None:
    call = make_call(problem, past, count, spare, seed)  # NaN in every slot that nobody sees
    (got,) = cached(problem)(*call.tensors)
    value = call.tensors[2]
    assert_near(got, call.eager(), float(value[value.isfinite()].abs().max()))
    first = data.draw(st.integers(0, count - 17))
    number = data.draw(st.integers(17, count - first))
    (part,) = cached(problem)(*call.rows(first, number).tensors)
    assert same_bits(part, got[:, :, first : first + number].contiguous())


def test_a_mask_of_a_row_over_a_cache() -> None:
    problem = Problem(2, 1, 32, 16, mask="float", soft_cap=3.0)
    call = make_call(problem, [70, 3], 90, 5)
    (got,) = cached(problem)(*call.tensors)
    value = call.tensors[2]
    assert_near(got, call.eager(), float(value[value.isfinite()].abs().max()))


def test_scores_that_rise_and_a_row_that_sees_nothing() -> None:
    inputs = draw(SHAPES[1], 190, 3, masked=True)
    inputs[0] = inputs[0].abs() * 2
    inputs[1] = (
        inputs[1].abs() * torch.linspace(0, 4, 190)[:, None]
    )  # weights are measured anew block by block
    inputs[3][:, :, 100] = False
    (got,) = built(KINDS[0], SHAPES[1], 5.0, True)(*inputs)
    assert not got[:, 100].any()
    want = reference(KINDS[0], SHAPES[1], 5.0, inputs).nan_to_num(0)
    assert_near(got, want, float(inputs[2].abs().max()))


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
