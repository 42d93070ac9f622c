"""Kernels of cached_rows against eager, in C++, in the interpreter and in Triton; sums beside caches in place."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.codegen.cached_cases import path_of, plan_of_graph, random_parents, symbolic_graph
from tests.pipeline.stages import run_interpreted
from torchweld.codegen.build_plan import BuiltPlan
from torchweld.codegen.executable import Executable
from torchweld.codegen.lower import LoweredGroup, lower_group
from torchweld.codegen.plan import EagerStep
from torchweld.codegen.reference import group_reference
from torchweld.graph.groups import Group

ops = torch.ops.torchweld
FEATURES = 7


def mixed(taps: int, dilation: int, *tensors: Tensor) -> tuple[Tensor]:
    """What a convolution reads of a cache, times a table."""
    cache, past, positions, table, *path = tensors
    read = ops.cached_rows(cache, past, positions, path[0] if path else None, taps, dilation)
    return (read * table,)


def make_tensors(
    past: list[int], count: int, taps: int, dilation: int, tree: bool, seed: int
) -> tuple[Tensor, ...]:
    """A cache with NaN in every slot that no row reads, some of which have turned."""
    draw = torch.Generator().manual_seed(seed)
    back = (taps - 1) * dilation
    capacity = back + count + 2
    cache = torch.full((len(past), 1, capacity, FEATURES), float("nan"))
    for b, before in enumerate(past):
        slots = torch.arange(max(0, before - back), before + count) % capacity
        cache[b, 0, slots] = torch.randn(len(slots), FEATURES, generator=draw)
    table = torch.randn(taps, FEATURES, generator=draw)
    lengths = torch.tensor(past, dtype=torch.int64)
    if not tree:
        return cache, lengths, lengths[:, None] + torch.arange(count), table
    path = torch.stack([path_of(random_parents(count, draw)) for _ in past])
    return cache, lengths, lengths[:, None] + (path >= 0).sum(2) - 1, table, path


@functools.cache
def built(taps: int, dilation: int, tree: bool) -> BuiltPlan:
    tensors = make_tensors([5, 2], 3, taps, dilation, tree, 0)
    dynamic: dict[int, tuple[int, ...]] = {0: (0, 2), 1: (0,), 2: (0, 1)}
    dynamic |= {4: (0, 1, 2)} if tree else {}
    return plan_of_graph(symbolic_graph(functools.partial(mixed, taps, dilation), tensors, dynamic))


@functools.cache
def executable(taps: int, dilation: int, tree: bool, threads: int) -> Executable:
    return Executable(built(taps, dilation, tree).plan, threads=threads)


@settings(max_examples=30, deadline=None)
@given(
    past=st.lists(st.integers(0, 40), min_size=1, max_size=3), count=st.integers(1, 6),
    kernel=st.sampled_from([(3, 1), (4, 2)]), tree=st.booleans(), threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_compiled_and_interpreted_equal_eager(
    past: list[int], count: int, kernel: tuple[int, int], tree: bool, threads: int, seed: int
) -> None:
    tensors = make_tensors(past, count, *kernel, tree, seed)
    (wanted,) = mixed(*kernel, *tensors)
    assert not wanted.isnan().any()
    (interpreted,) = run_interpreted(built(*kernel, tree), tensors)
    (compiled,) = executable(*kernel, tree, threads)(*tensors)
    for found in (interpreted, compiled):
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tree", [False, True])
def test_reading_costs_one_launch_and_no_copy_of_the_cache(tree: bool) -> None:
    plan = built(3, 1, tree).plan
    assert len(plan.steps) == len(plan.launches()) == 1


def test_the_reference_of_a_dump_is_plain_torch() -> None:
    tensors = make_tensors([5, 2], 3, 3, 1, True, 0)
    module = symbolic_graph(functools.partial(mixed, 3, 1), tensors, {})
    group = Group(0, tuple(node for node in module.graph.nodes if node.op == "call_function"))
    lowered = lower_group(group, 2)
    assert isinstance(lowered, LoweredGroup)
    source = group_reference(group, lowered)
    assert "torchweld." not in source
    names: dict[str, Any] = {"torch": torch}
    exec(source, names)
    placeholders = module.graph.find_nodes(op="placeholder")
    by_node = dict(zip(placeholders, tensors, strict=True))
    (found,) = names["reference"](*(by_node[group.inputs[place]] for place in lowered.input_positions))
    torch.testing.assert_close(found, mixed(3, 1, *tensors)[0])


# -- sums -----------------------------------------------------------------------------------------------------


def summed(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    sums = ops.cached_running(cache, rows * 2, past, None, "sum")
    return sums + 1, ops.append_rows(cache, sums, past)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_sums_are_read_before_they_are_written_in_place(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    cache = (9 * torch.randn(2, 1, 9, FEATURES, generator=draw)).to(dtype)
    rows, past = (9 * torch.randn(2, 1, 3, FEATURES, generator=draw)).to(dtype), torch.tensor([25, 0])
    plan = plan_of_graph(symbolic_graph(summed, (cache, rows, past), {0: (0, 2), 1: (0, 2), 2: (0,)})).plan
    assert list(plan.in_place.values()) == [plan.inputs[0].name]
    (eager,) = (step for step in plan.steps if isinstance(step, EagerStep))
    assert "takes in one new row after the other" in eager.reason
    wanted = summed(cache, rows, past)
    given = cache.clone()
    found = Executable(plan, threads=1)(given, rows, past)
    assert found[1] is given
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def test_a_sum_that_is_no_part_of_the_rows_keeps_the_cache_from_being_overwritten() -> None:
    def beside(cache: Tensor, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        return ops.append_rows(cache, rows, past), ops.cached_running(cache, rows, past, None, "sum")

    inputs = (torch.randn(1, 1, 5, 3), torch.randn(1, 1, 2, 3), torch.tensor([4]))
    plan = plan_of_graph(symbolic_graph(beside, inputs, {})).plan
    assert not plan.in_place
    copies = [tensor.clone() for tensor in inputs]
    for got, want in zip(Executable(plan, threads=1)(*copies), beside(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(copies[0], inputs[0])


# -- Triton ---------------------------------------------------------------------------------------------------


def run_on_triton(folder: str) -> list[float]:
    """The greatest errors of a chain and a tree in Triton's interpreter (the process was started for that)."""
    from tests.pipeline.triton_programs import TritonRunner
    from torchweld.codegen.plan_inputs import bind_sizes

    runner, errors = TritonRunner(Path(folder)), []
    for tree in (False, True):
        tensors = make_tensors([20, 3], 4, 4, 2, tree, 5)
        plan = built(4, 2, tree).plan
        (launch,) = plan.launches()
        values = dict(zip((spec.name for spec in plan.inputs), tensors, strict=True))
        sizes = bind_sizes(plan, [tuple(tensor.shape) for tensor in tensors])
        pairs = zip(launch.kernel.buffers, launch.arguments, strict=True)
        given = {buffer.name: values[name] for buffer, name in pairs if not buffer.is_written}
        (result,) = runner(launch.kernel, given, sizes).values()
        errors.append(float((result - mixed(4, 2, *tensors)[0]).abs().max().nan_to_num(nan=float("inf"))))
    return errors


def test_triton_kernels_equal_eager(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.codegen.test_cached_rows", str(tmp_path)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    errors = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert len(errors) == 2 and max(errors) < 2e-6, errors


if __name__ == "__main__":
    print(run_on_triton(sys.argv[1]))
