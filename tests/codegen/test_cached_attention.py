"""Attention over a cache: every way to run it against float64, and the same bits for a row however it is computed."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.cached_cases import TRITON_CALLS, Call, Problem, alone, kernel_of, make_call, path_of
from tests.codegen.cpp_cases import plan_of, same_bits
from torchweld.codegen.dump import fit_kernels
from torchweld.codegen.executable import Executable
from torchweld.codegen.formula import formula
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import AttentionPart
from torchweld.codegen.plan_inputs import bind_sizes
from torchweld.codegen.plan_json import plan_from_json, plan_to_json
from torchweld.graph.target import GFX942, SM_90
from torchweld.graph.terms import Attend

#: Sharing, widths that fill no vector, windows around the sizes of blocks and splits, trees, masks, soft cap.
PLAIN = Problem(3, 1, 20, 72)
WINDOW = Problem(6, 2, 16, 16, window=130)
WINDOW_TREE = Problem(6, 2, 16, 16, window=130, tree=True)
MASKED = Problem(4, 1, 16, 24, mask="float", soft_cap=3.0)
MASKED_TREE = Problem(4, 1, 16, 24, mask="float", soft_cap=3.0, tree=True)
SINKS = Problem(3, 1, 20, 72, sinks=True)
SINKS_WINDOW_TREE = Problem(6, 2, 16, 16, window=130, tree=True, sinks=True)
SINKS_MASKED = Problem(4, 1, 16, 24, mask="bool", sinks=True)
UNSHARED = Problem(2, 2, 32, 16)  # a row of a tile per query: one to four take their keys from registers
PROBLEMS = (PLAIN, WINDOW, WINDOW_TREE, MASKED, MASKED_TREE, SINKS, SINKS_WINDOW_TREE, SINKS_MASKED)
#: Around the ends of blocks (64) and splits (128).
LENGTHS = st.one_of(st.integers(0, 12), st.sampled_from([60, 63, 64, 65, 120, 127, 128, 129, 190, 260, 400]))


@functools.cache
def executable(problem: Problem, threads: int = 1) -> Executable:
    return Executable(plan_of(kernel_of(problem)), threads=threads)


def compiled(call: Call, threads: int = 1) -> Tensor:
    (result,) = executable(call.problem, threads)(*call.tensors)
    return result


def interpreted(call: Call) -> Tensor:
    kernel = kernel_of(call.problem)
    names = [buffer.name for buffer in kernel.buffers if not buffer.is_written]
    sizes = bind_sizes(plan_of(kernel), [tuple(tensor.shape) for tensor in call.tensors])
    (result,) = interpret(kernel, dict(zip(names, call.tensors, strict=True)), sizes).values()
    return result


def assert_near(found: Tensor, call: Call) -> None:
    expected = call.eager()
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5, check_dtype=False)


@given(
    problem=st.sampled_from(PROBLEMS), past=st.lists(LENGTHS, max_size=3), count=st.integers(1, 20),
    spare=st.integers(0, 70), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_compiled_and_interpreted_equal_eager(
    problem: Problem, past: list[int], count: int, spare: int, seed: int
) -> None:
    call = make_call(problem, past, count, spare, seed)
    assert_near(compiled(call), call)
    assert_near(interpreted(call), call)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_rows_and_no_sequences(problem: Problem) -> None:
    for past, count in (([5, 3], 0), ([], 4)):
        call = make_call(problem, past, count, 2)
        shape = (len(past), problem.query_heads, count, problem.value_features)
        assert compiled(call).shape == interpreted(call).shape == shape


@pytest.mark.parametrize("problem", [PLAIN, WINDOW_TREE])
def test_many_rows_need_several_tiles(problem: Problem) -> None:
    call = make_call(problem, [3, 140], 150, 5)
    assert_near(compiled(call), call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    call = make_call(Problem(4, 2, 20, 24, dtype=dtype), [70, 3], 5, 2)
    loose = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for result in (compiled(call), interpreted(call)):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), call.eager(), rtol=loose, atol=loose)


@given(
    problem=st.sampled_from(PROBLEMS), past=st.lists(LENGTHS, min_size=1, max_size=2), count=st.integers(1, 16),
    spare=st.integers(0, 70), slots=st.integers(0, 90), data=st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_row_has_the_same_bits_alone_in_a_tree_in_a_batch_and_in_any_ring(
    problem: Problem, past: list[int], count: int, spare: int, slots: int, data: st.DataObject
) -> None:
    call = make_call(problem, past, count, spare)
    together = compiled(call)
    sequence, row = data.draw(st.integers(0, len(past) - 1)), data.draw(st.integers(0, count - 1))
    needed = problem.window or past[sequence] + count
    single = alone(call, sequence, row, needed + slots)
    assert same_bits(compiled(single)[0, :, 0], together[sequence, :, row])


@pytest.mark.parametrize("problem", [PLAIN, SINKS, UNSHARED])
@pytest.mark.parametrize("count", range(1, 17))
def test_bits_do_not_depend_on_the_number_of_rows(count: int, problem: Problem) -> None:
    whole = make_call(problem, [250], 16, 0)
    expected = compiled(whole)
    for first in range(0, 16 - count + 1, count):
        part = compiled(whole.rows(first, count))
        assert same_bits(part, expected[:, :, first : first + count].contiguous())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("past", [[0], [700], [127, 128]])
def test_bits_do_not_depend_on_the_threads(problem: Problem, past: list[int]) -> None:
    for count in (1, 7, 40):
        call = make_call(problem, past, count, 1)
        expected = compiled(call)
        for threads in (2, 3):
            for _ in range(3):  # the counters of the splits are as they were
                assert same_bits(compiled(call, threads), expected)


def test_a_chain_is_a_tree() -> None:
    plain = make_call(WINDOW, [166], 9, 3)
    tree = Call(WINDOW_TREE, (*plain.tensors, path_of(range(-1, 8))[None]))
    assert same_bits(compiled(tree), compiled(plain))


def test_what_nobody_sees_may_be_anything() -> None:
    """Slots outside a window and unwritten ones hold NaN in every test here; so may rows that others see."""
    call = make_call(PLAIN, [5], 2, 3)
    poisoned = tuple(tensor.clone() for tensor in call.tensors)
    poisoned[1][:, :, 6], poisoned[2][:, :, 6] = float("nan"), float("nan")  # the key of the second row
    result = compiled(Call(PLAIN, poisoned))
    assert same_bits(result[:, :, 0].contiguous(), compiled(call)[:, :, 0].contiguous())
    assert bool(result[:, :, 1].isnan().all())


@pytest.mark.parametrize("problem", [PLAIN, WINDOW])
def test_a_cache_that_is_too_small_is_an_error(problem: Problem) -> None:
    query, key, value, past = make_call(problem, [150], 3, 0).tensors
    with pytest.raises(IndexError, match="outside its table"):
        executable(problem)(query, key[:, :, :100].contiguous(), value[:, :, :100].contiguous(), past)


def test_a_path_out_of_range_is_an_error() -> None:
    *tensors, path = make_call(WINDOW_TREE, [5], 3, 0).tensors
    with pytest.raises(IndexError, match="outside its table"):
        executable(WINDOW_TREE)(*tensors, torch.where(path == 2, 77, path))


def test_lowering_keeps_what_matters() -> None:
    kernel = kernel_of(WINDOW_TREE)
    (part,) = kernel.parts
    assert isinstance(part, AttentionPart)
    attend = part.attend.term
    assert isinstance(attend, Attend)
    assert (attend.share, attend.mask_kind, attend.window) == (3, "window", 130)
    assert attend.past is not None and attend.path is not None and attend.steps is not None
    assert attend.steps.extent == attend.t_extent == part.t.extent
    assert any("window of 130 over a cache after" in line and "tree" in line for line in formula(kernel))


def test_a_stored_plan_comes_back() -> None:
    plan = plan_of(kernel_of(MASKED_TREE))
    again = plan_from_json(plan_to_json(plan, lambda tensor: ""), {})
    call = make_call(MASKED_TREE, [3, 70], 4, 2)
    assert same_bits(Executable(again, threads=1)(*call.tensors)[0], compiled(call))


def test_triton_kernels_equal_eager(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.codegen.cached_cases", str(tmp_path)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    output = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    errors = ast.literal_eval(output.strip().splitlines()[-1])
    assert len(errors) == len(TRITON_CALLS) and max(errors) < 2e-6, errors


@pytest.mark.slow
def test_kernels_fit_gpus() -> None:
    kernels = [kernel_of(problem) for problem in (Problem(4, 1, 256, 256, window=512), MASKED_TREE)]
    _, builds = fit_kernels(kernels, [SM_90, GFX942])
    for build in builds:
        assert build.problem is None, f"{build.kernel} for {build.target}: {build.problem}"
        assert build.resources is not None and build.resources.spilled_bytes == 0
