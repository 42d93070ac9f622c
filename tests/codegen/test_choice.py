"""Searches of a matmul's result: which are one kernel, which are refused and why, and what they mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import FusionCase, numbers, reasons
from torchweld.codegen.families.choice import MOST_ENTRIES
from torchweld.codegen.ir import MatmulPart
from torchweld.passes import FUSE, fuse_vertical

X, W = numbers(1, 5, 16), numbers(50, 16, seed=1)


def search_of(case: FusionCase, op: str) -> MatmulPart:
    case.fuse(*FUSE)
    (part,) = case.kernel(op).parts
    assert isinstance(part, MatmulPart) and part.choices
    case.assert_fused_numbers()
    return part


def test_argmax_of_a_linear_is_one_kernel_that_stores_places_only() -> None:
    case = FusionCase(lambda m, x: F.linear(x, m.w).argmax(-1), X, w=W)
    part = search_of(case, "linear")
    assert part.ranks == () and [str(axis.extent) for axis in part.rows] == ["1", "5"]
    assert [buffer.name for buffer in case.kernel("linear").buffers] == ["inputs_0", "w", "argmax_out"]


def test_both_results_of_a_topk_are_one_search() -> None:
    def capped(m: object, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = torch.topk(torch.tanh(F.linear(x, m.w) / 3) * 3, 4)  # type: ignore[attr-defined]
        return values * 2, places

    part = search_of(FusionCase(capped, X, w=W), "linear")
    assert [bind.term.dtype for bind in part.choices] == [torch.float32, torch.int64]
    assert [int(axis.extent) for axis in part.ranks] == [4]


def test_greatest_and_place_are_one_search() -> None:
    part = search_of(FusionCase(lambda m, x: F.linear(x, m.w).max(-1, keepdim=True), X, w=W), "linear")
    assert len(part.choices) == 2


def test_batches_of_matmuls_are_searched() -> None:
    case = FusionCase(lambda m, x, y: (x @ y).topk(3), numbers(2, 5, 8), numbers(2, 8, 9))
    part = search_of(case, "matmul")
    assert len(part.batch) == 1


REFUSED = {
    "the result of a matmul is searched beside another matmul": lambda y: (y, y.argmax(-1)),
    "a reduction or a selection over the result of a matmul or an attention": lambda y: y.argmin(-1),
    "a search over several axes of a matmul's result": lambda y: y.amax((1, 2)),
    "a search of a matmul's rows beside another reduction or matmul": lambda y: y.amax(-1) + X.sum(-1),
    f"the {MOST_ENTRIES + 1} greatest entries of a matmul's rows; at most {MOST_ENTRIES}": (
        lambda y: y.topk(MOST_ENTRIES + 1)[0]
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    function = REFUSED[reason]
    case = FusionCase(lambda m, x: function(F.linear(x, m.w)), X, w=numbers(300, 16))
    assert reason in reasons(case.fuse(fuse_vertical)), reasons(case.fuse(fuse_vertical))


def test_topk_of_a_tensor_is_torchs() -> None:
    case = FusionCase(lambda m, x: torch.topk(x, 2), X)
    (group,) = case.groups.groups.values()
    assert group.eager is not None and "in memory" in group.eager
    case.assert_fused_numbers()


def test_the_formula_names_the_rank(golden: object) -> None:
    case = FusionCase(lambda m, x: F.linear(x, m.w).topk(3), X, w=W)
    case.fuse(*FUSE)
    golden("choice/topk.txt", case.text())  # type: ignore[operator]
