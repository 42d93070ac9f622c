"""Producers of one result in one kernel with it: fires, refuses clause by clause, keeps the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import NO_RECOMPUTATION, FusionCase, numbers, reasons
from torchweld.codegen.ir import MatmulPart
from torchweld.passes import fuse_input, fuse_output, fuse_vertical


def side_by_side(dynamic: bool = False) -> FusionCase:
    """Two matmuls of different inputs, concatenated."""
    return FusionCase(
        lambda m, x, y: torch.cat([F.linear(x, m.w), F.linear(y, m.v)], -1),
        numbers(2, 5, 8), numbers(2, 5, 4), dynamic=dynamic, w=numbers(6, 8), v=numbers(3, 4),
    )  # fmt: skip


def test_writes_the_pieces_of_a_concatenation_in_place() -> None:
    case = side_by_side()
    assert case.fuse(fuse_output).applied == 2
    assert case.ops() == ["linear linear cat"]
    kernel = case.kernel("cat")
    assert [buffer.name for buffer in kernel.buffers if buffer.role == "output"] == ["cat_out"]
    starts = [
        part.stores[0].index[-1] - part.n.symbol for part in kernel.parts if isinstance(part, MatmulPart)
    ]
    assert starts == [0, 6]
    case.assert_fused_numbers()


def test_joins_a_sum_of_matmuls() -> None:
    case = FusionCase(
        lambda m, x, y: F.linear(x, m.w) + F.linear(y, m.v),
        numbers(5, 8),
        numbers(5, 4),
        w=numbers(6, 8),
        v=numbers(6, 4),
    )
    case.fuse(fuse_vertical)
    assert len(case.ops()) == 2, "vertical fusion joins the sum with one of them"
    assert case.fuse(fuse_output).applied == 1
    assert case.ops() == ["linear linear add"]
    (part,) = case.kernel("add").parts
    assert isinstance(part, MatmulPart) and len(part.contracts) == 2
    case.assert_fused_numbers()


def test_finds_moves_around_a_new_group() -> None:
    """Once the first matmul is in, the new group is a consumer again."""
    case = side_by_side()
    assert case.fuse(fuse_output).matched == 3
    fresh = side_by_side()
    first, second, cat = sorted(fresh.groups.groups)
    assert set(fuse_output.find(fresh.groups)) == {(first, cat), (second, cat)}
    assert set(fuse_output.find(fresh.groups, cat)) == {(first, cat), (second, cat)}


def test_finds_the_consumers_of_a_new_group() -> None:
    case = side_by_side()
    first, _, cat = sorted(case.groups.groups)
    assert (first, cat) in set(fuse_output.find(case.groups, first))


def test_keeps_the_numbers_at_other_sizes() -> None:
    case = side_by_side(dynamic=True)
    case.fuse(fuse_output)
    assert case.ops() == ["linear linear cat"]
    case.assert_fused_numbers(numbers(3, 1, 8), numbers(3, 1, 4))


def test_a_concatenation_along_a_dynamic_dimension_keeps_the_numbers() -> None:
    case = FusionCase(
        lambda m, x, y: torch.cat([x.exp(), y], 1), numbers(2, 5, 4), numbers(2, 3, 4),
        dynamic={"inputs_0": [1], "inputs_1": [1]},
    )  # fmt: skip
    case.fuse(fuse_output)
    assert case.ops() == ["exp cat"]
    case.assert_fused_numbers(numbers(2, 4, 4), numbers(2, 7, 4))


def test_finds_nothing_where_the_consumer_is_neither() -> None:
    case = FusionCase(lambda m, x: F.linear(x, m.w).relu(), numbers(5, 8), w=numbers(6, 8))
    assert case.fuse(fuse_output).matched == 0


def test_refuses_an_eager_member() -> None:
    case = FusionCase(lambda m, x, y: torch.cat([torch.cumsum(x, 0), y], -1), numbers(5, 8), numbers(5, 3))
    outcome = case.fuse(fuse_output)
    assert reasons(outcome) == {"runs eagerly: aten.cumsum.default: no rule gives its elements": 1}


def test_refuses_a_cycle() -> None:
    case = FusionCase(lambda m, x: torch.cat([e := x.exp(), torch.cumsum(e, 0)], -1), numbers(5, 8))
    outcome = case.fuse(fuse_output)
    assert reasons(outcome)["would make a cycle: another group stands between them"] == 1
    assert case.ops() == ["exp", "cumsum", "cat"]
    assert all(refusal.node is not None for refusal, _ in outcome.refused), "refused before it is a candidate"
    case.assert_fused_numbers()


def test_refuses_work_in_front_of_one_matmul() -> None:
    case = FusionCase(lambda m, x: F.linear(F.rms_norm(x, (8,)), m.w), numbers(5, 8), w=numbers(6, 8))
    outcome = case.fuse(fuse_output)
    assert reasons(outcome) == {"only one of them is built around a matmul: vertical fusion joins those": 1}
    assert case.ops() == ["rms_norm", "linear"]


def test_refuses_a_pair_without_a_kernel() -> None:
    case = FusionCase(
        lambda m, x: F.linear(F.linear(x, m.w), m.v), numbers(5, 8), w=numbers(8, 8), v=numbers(8, 8)
    )
    outcome = case.fuse(fuse_output)
    assert reasons(outcome) == {"a matmul whose operand is a matmul": 1}
    assert case.ops() == ["linear", "linear"]


def test_refuses_what_does_not_pay() -> None:
    """The piece stands twice in the result: its tanh would be computed twice."""
    case = FusionCase(
        lambda m, x: torch.cat([t := x.tanh(), t], -1), numbers(64, 64), target=NO_RECOMPUTATION
    )
    outcome = case.fuse(fuse_output)
    assert reasons(outcome) == {"does not pay by the cost model": 1}
    assert case.ops() == ["tanh", "cat"]


def test_after_the_other_passes_the_pieces_share_everything() -> None:
    """A matmul with a norm in front, one with an activation behind: one kernel with the concatenation."""

    def block(m: Any, x: Tensor) -> Tensor:
        return torch.cat([F.linear(F.rms_norm(x, (8,)), m.w), F.silu(F.linear(x, m.v))], -1)

    case = FusionCase(block, numbers(5, 8), w=numbers(6, 8), v=numbers(3, 8))
    case.fuse(fuse_input, fuse_vertical, fuse_output)
    assert case.ops() == ["rms_norm linear linear silu cat"]
    case.assert_fused_numbers()


def test_golden(golden: Callable[[str, str], None]) -> None:
    case = side_by_side()
    case.fuse(fuse_output)
    golden("fuse_output/linear_beside_linear.txt", case.text())
