"""What shape rules gave is remembered where the operands look the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchweld.graph.shape_memo import ShapeMemo

aten = torch.ops.aten
Call = tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode()


def look(value: object) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.storage_offset()
    return value


def test_equal_operands_are_not_run_again(mode: FakeTensorMode) -> None:
    memo, calls = ShapeMemo(), 0
    with mode:
        for _ in range(3):
            x = torch.empty(2, 3, 4)
            result = memo.run(aten.permute.default, (x, [0, 2, 1]), {})
            assert look(result) == look(x.permute(0, 2, 1))
            calls += 1
    assert memo.recalled == calls - 1


def test_what_differs_is_run(mode: FakeTensorMode) -> None:
    with mode:
        x, other = torch.empty(4, 6), torch.empty(4, 6, dtype=torch.float64)
        calls: list[Call] = [
            (aten.reshape.default, (x, [24]), {}),
            (aten.reshape.default, (x, [2, 12]), {}),
            (aten.reshape.default, (x.t(), [24]), {}),
            (aten.reshape.default, (torch.empty(5, 6)[1:], [24]), {}),
            (aten.reshape.default, (other, [24]), {}),
            (aten.permute.default, (x, [1, 0]), {}),
            (aten.permute.default, (x, [0, 1]), {}),
            (aten.add.Tensor, (x, 1), {}),
            (aten.add.Tensor, (x, True), {}),
            (aten.add.Tensor, (x, 1.0), {}),
            (aten.add.Tensor, (x, 1), {"alpha": 2}),
            (aten._to_copy.default, (x,), {"dtype": torch.float64}),
            (aten._to_copy.default, (x,), {"dtype": torch.int64}),
            (aten.full.default, ([2], 0.0), {}),
            (aten.full.default, ([2], -0.0), {}),
        ]
        memo = ShapeMemo()
        for target, args, kwargs in calls:
            assert look(memo.run(target, args, kwargs)) == look(target(*args, **kwargs))
    assert memo.recalled == 0


def test_what_has_a_value_is_not_remembered(mode: FakeTensorMode) -> None:
    memo = ShapeMemo()
    with mode:
        for number in (1, 2):
            scalar = torch.tensor(number)
            assert scalar.constant is not None  # type: ignore[attr-defined]
            memo.run(aten.neg.default, (scalar,), {})
        for _ in range(2):
            assert memo.run(aten.sym_size.int, (torch.empty(3), 0), {}) == 3
    assert memo.recalled == 0


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    axes=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.int64)),
)
def test_the_result_is_that_of_the_op(sizes: list[int], axes: tuple[int, int], dtype: torch.dtype) -> None:
    first, second = (axis % len(sizes) for axis in axes)
    memo = ShapeMemo()
    with FakeTensorMode():
        for _ in range(2):
            x = torch.empty(sizes, dtype=dtype)
            turned: Any = memo.run(aten.transpose.int, (x, first, second), {})
            assert look(turned) == look(x.transpose(first, second))
            both = memo.run(aten.cat.default, ([turned, turned], first), {})
            assert look(both) == look(torch.cat([turned, turned], first))
    assert memo.recalled == 2
