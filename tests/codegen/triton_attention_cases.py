"""Tests of Triton attention that run in Triton's interpreter; test_triton_attention.py starts them.

A process of its own, because Triton is an interpreter or a compiler from the moment it is imported:
`TRITON_INTERPRET=1 pytest tests/codegen/triton_attention_cases.py`.  Splits are of 32 keys here, so that few keys are
many splits.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.cached_cases import Call, Problem, kernel_of, make_call
from tests.codegen.cpp_cases import plan_of
from tests.codegen.triton_cases import difference, load_printed
from torchweld.codegen.ir import Kernel, Schedule
from torchweld.codegen.plan_inputs import bind_sizes
from torchweld.codegen.triton import build_triton

THREE_HEADS = Problem(3, 1, 20, 24)  # rows per tile are no multiple of 3: a tile begins inside a query
WINDOW = Problem(8, 2, 16, 16, window=40, sinks=True)
TREE = Problem(2, 1, 16, 16, tree=True, mask="float", soft_cap=3.0)
WINDOW_TREE = Problem(4, 2, 16, 16, window=40, tree=True, sinks=True)
ONE_HEAD_EACH = Problem(2, 2, 16, 16, mask="bool")
PROBLEMS = (THREE_HEADS, WINDOW, TREE, WINDOW_TREE, ONE_HEAD_EACH)
SMALL_SPLITS = Schedule(block_rows=16, block_k=16, warps=4, stages=1, split_keys=32)
#: Around the ends of blocks (16) and splits (32).
LENGTHS = st.one_of(st.integers(0, 3), st.sampled_from([14, 15, 16, 17, 30, 31, 32, 33, 63, 64, 90]))
FOLDER = Path(tempfile.mkdtemp())
FORWARD, BACKWARD = "pid = tl.program_id(0)", "pid = tl.num_programs(0) - 1 - tl.program_id(0)"


def split(kernel: Kernel) -> Kernel:
    """The kernel with small splits."""
    return replace(kernel, parts=tuple(replace(part, schedule=SMALL_SPLITS) for part in kernel.parts))


@functools.cache
def loaded(problem: Problem, backward: bool = False, counting: bool = False) -> ModuleType:
    """The printed kernel; its programs in descending order, or with a list `visits` of the key blocks it met."""
    printed = build_triton(split(kernel_of(problem)))
    source = printed.source
    if backward:
        assert FORWARD in source
        source = source.replace(FORWARD, BACKWARD)
    if counting:
        loop = next(line for line in source.splitlines() if "for start in range(" in line)
        inside = f"{' ' * (len(loop) - len(loop.lstrip()) + 4)}visits.append(1)"
        source = "visits = []\n\n\n" + source.replace(loop, f"{loop}\n{inside}")
    name = f"kernel_{loaded.cache_info().currsize}"
    return load_printed(FOLDER / f"{name}.py", replace(printed, source=source))


def sizes_of(call: Call) -> dict[str, int]:
    """The kernel's sizes for a call."""
    return bind_sizes(plan_of(kernel_of(call.problem)), [tuple(tensor.shape) for tensor in call.tensors])


class Runs:
    """Runs of one call with one scratch; every run must leave its counters at 0."""

    def __init__(self, call: Call) -> None:
        self.call, self.sizes = call, sizes_of(call)
        self.shared = loaded(call.problem).scratch(**self.sizes, device="cpu")

    def __call__(self, backward: bool = False, alone: bool = False) -> Tensor:
        """The result of programs in ascending or descending order, or of one program per tile."""
        module = loaded(self.call.problem, backward)
        (result,) = module.allocate(**self.sizes, device="cpu")
        result.fill_(float("nan"))
        programs, shared = module.program_count(**self.sizes), self.shared
        if alone:
            programs, shared = programs // shared[0], [1, *shared[1:]]
        module.run(*self.call.tensors, result, **self.sizes, programs=programs, shared=shared)
        assert not bool(self.shared[2].any()), "a counter is not back at 0"
        assert isinstance(result, Tensor)
        return result


@given(
    problem=st.sampled_from(PROBLEMS), past=st.lists(LENGTHS, min_size=1, max_size=2), count=st.integers(1, 4),
    spare=st.integers(0, 20), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=6)
def test_equals_eager_and_bits_do_not_depend_on_who_computes(
    problem: Problem, past: list[int], count: int, spare: int, seed: int
) -> None:
    call = make_call(problem, past, count, spare, seed)
    run = Runs(call)
    result = run()
    assert difference(result.double(), call.eager(), 2e-6) is None
    assert torch.equal(result, run(alone=True))
    assert torch.equal(result, run(backward=True))


def test_many_programs_share_a_tile_and_one_alone_does_all() -> None:
    sizes = sizes_of(make_call(THREE_HEADS, [500], 1, 11))
    module = loaded(THREE_HEADS)
    assert module.split_count(**sizes) == 16 == module.program_count(**sizes)
    assert module.scratch(**sizes, device="cpu")[1].numel() == 16 * 16 * (32 + 2)
    many = sizes_of(make_call(THREE_HEADS, [3] * 64, 1, 0))
    assert module.split_count(**many) == 1 and module.program_count(**many) == 64
    assert module.scratch(**many, device="cpu")[1].numel() == 0


@pytest.mark.parametrize("past", [0, 9, 10_000])
def test_blocks_outside_the_window_are_not_met(past: int) -> None:
    problem = WINDOW
    call, module = make_call(problem, [past], 3, 0), loaded(problem, counting=True)
    module.visits.clear()
    module.launch(*call.tensors, **sizes_of(call))
    first, end = max(past - problem.window + 1, 0) // 16, -(-(past + 3) // 16)
    assert len(module.visits) == (end - first) * problem.key_heads


def test_programs_count_key_heads_not_query_heads() -> None:
    for heads in (2, 8):
        call = make_call(Problem(heads, 2, 16, 16), [20], 1, 3)
        module = loaded(call.problem, counting=True)
        module.visits.clear()
        (result,) = module.launch(*call.tensors, **sizes_of(call))
        assert len(module.visits) == 2 * 2  # two key heads, two blocks of 16 keys
        assert difference(result.double(), call.eager(), 2e-6) is None
