"""What each kernel family accepts and refuses, and the numbers of what it accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import EAGER_TO_FUSE, FusionCase, lower, numbers
from torchweld.codegen.ir import AttentionPart, Kernel, MatmulPart, Part, RowPart
from torchweld.graph.meaning import Unsupported
from torchweld.graph.ops import attention as _attention_op  # noqa: F401  registers torchweld::attention
from torchweld.graph.terms import Attend, Contract, Fold, Ref, walk

Function = Callable[..., Any]
WEIGHT = numbers(6, 8, seed=9)
HEADS = (numbers(1, 2, 3, 4), numbers(1, 2, 5, 4, seed=1), numbers(1, 2, 5, 4, seed=2))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.torchweld.attention(q, k, v, mask, "none", 0, 0.5, 0.0)
    return result


def joined(function: Function, *inputs: Tensor, **weights: Tensor) -> Kernel:
    """The whole function as one kernel, whose numbers are checked."""
    case = FusionCase(function, *inputs, target=EAGER_TO_FUSE, dynamic=False, **weights)
    numbers_of_groups = [group.id for group in case.groups.topological()]
    if len(numbers_of_groups) > 1:
        case.groups.contract(numbers_of_groups)
    case.assert_fused_numbers()
    return case.kernel(case.ops()[0].split()[0])


def only_part(kernel: Kernel) -> Part:
    (part,) = kernel.parts
    return part


# -- rows -----------------------------------------------------------------------------------------------------


def test_without_reductions_the_last_axis_is_inside() -> None:
    part = only_part(joined(lambda m, x: x.exp() + 1, numbers(2, 3, 4)))
    assert isinstance(part, RowPart)
    assert ([a.extent for a in part.grid], [a.extent for a in part.inner]) == ([2, 3], [4])


def test_a_number_has_no_axes() -> None:
    part = only_part(joined(lambda m, x: x * 2, torch.tensor(3.0)))
    assert isinstance(part, RowPart) and (part.grid, part.inner) == ((), ())


def test_the_grid_holds_what_reductions_depend_on() -> None:
    part = only_part(joined(lambda m, x: F.softmax(x, 1), numbers(2, 3, 4)))
    assert isinstance(part, RowPart)
    assert ([a.extent for a in part.grid], [a.extent for a in part.inner]) == ([2, 4], [3])
    assert len(part.binds) == 2, "maximum and sum"


def test_a_sum_of_everything_has_an_empty_grid() -> None:
    part = only_part(joined(lambda m, x: x - x.sum(), numbers(3, 4)))
    assert isinstance(part, RowPart) and part.grid == () and len(part.inner) == 2


def test_later_reductions_use_earlier_ones_by_name() -> None:
    part = only_part(joined(lambda m, x: F.layer_norm(x, (4,)), numbers(3, 4)))
    assert isinstance(part, RowPart)
    mean, variance = part.binds
    assert any(isinstance(term, Ref) and term.name == mean.name for term in walk(variance.term))
    assert sum(isinstance(term, Fold) for bind in part.binds for term in walk(bind.term)) == 2
    assert not any(isinstance(term, Fold) for store in part.stores for term in walk(store.value))


def test_a_reduction_of_a_reduction_over_other_axes_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"a reduction inside another reduction's loop \(k\d+\)"):
        lower(lambda m, x: F.softmax(x, -1).sum(0), numbers(3, 4))


def test_a_reduction_that_depends_on_the_rows_only_may_stand_in_another() -> None:
    part = only_part(joined(lambda m, x: (x / x.sum(-1, keepdim=True)).amax(-1), numbers(3, 4)))
    assert isinstance(part, RowPart) and len(part.binds) == 2


# -- matmuls --------------------------------------------------------------------------------------------------


def matmul(function: Function, *inputs: Tensor, **weights: Tensor) -> MatmulPart:
    part = only_part(joined(function, *inputs, **weights))
    assert isinstance(part, MatmulPart)
    return part


def axes_of(part: MatmulPart) -> tuple[list[int], list[int], int]:
    return [int(a.extent) for a in part.batch], [int(a.extent) for a in part.rows], int(part.n.extent)


def test_a_linear_has_rows_and_no_batch() -> None:
    part = matmul(lambda m, x: F.linear(x, m.w), numbers(2, 3, 8), w=WEIGHT)
    assert axes_of(part) == ([], [2, 3], 6)


def test_a_batched_matmul_has_the_axes_of_its_right_operand_as_batch() -> None:
    part = matmul(lambda m, x, y: x @ y, numbers(2, 3, 8), numbers(2, 8, 5))
    assert axes_of(part) == ([2], [3], 5)


def test_a_vector_times_a_matrix_is_turned_round() -> None:
    part = matmul(lambda m, x: torch.mv(m.w, x), numbers(8), w=WEIGHT)
    assert axes_of(part) == ([], [], 6)
    (bind,) = part.contracts
    assert isinstance(bind.term, Contract)
    loads = [next(iter(walk(side))) for side in (bind.term.a, bind.term.b)]
    assert [getattr(load, "buffer", "") for load in loads] == ["inputs_0", "w"]


def test_a_dot_product_has_one_column() -> None:
    part = matmul(lambda m, x, y: torch.dot(x, y) * 2, numbers(8), numbers(8, seed=1))
    assert axes_of(part) == ([], [], 1)
    assert part.stores[0].index == ()


def test_statistics_of_rows_are_bound_before_the_sum() -> None:
    part = matmul(lambda m, x: F.linear(F.rms_norm(x, (8,)), m.w), numbers(3, 8), w=WEIGHT)
    (row_bind,) = part.row_binds
    (bind,) = part.contracts
    assert isinstance(bind.term, Contract)
    assert any(isinstance(term, Ref) and term.name == row_bind.name for term in walk(bind.term.a))
    assert not any(isinstance(term, Fold) for term in walk(bind.term))


def test_a_sum_with_a_transposed_matmul() -> None:
    """The second one's operands change sides."""
    part = matmul(
        lambda m, x, y: F.linear(x, m.w) + F.linear(y, m.v).T,
        numbers(4, 8),
        numbers(6, 8),
        w=WEIGHT,
        v=numbers(4, 8),
    )
    assert len(part.contracts) == 2 and axes_of(part) == ([], [4], 6)


def test_a_gather_of_columns_makes_rows_a_batch() -> None:
    """Each row then reads other rows of the weight."""
    columns = torch.tensor([[0, 5, 2, 1, 1, 3], [4, 4, 0, 5, 2, 2]])
    part = matmul(lambda m, x, i: F.linear(x, m.w).gather(1, i), numbers(2, 8), columns, w=WEIGHT)
    assert axes_of(part) == ([2], [], 6)


MATMUL_REFUSALS: dict[str, tuple[str, Function, tuple[Tensor, ...]]] = {
    "operand": (
        "a matmul whose operand is a matmul",
        lambda m, x: F.linear(F.linear(x, m.w) @ m.square, m.square),
        (numbers(4, 8),),
    ),
    "both": (
        "a matmul whose two operands both depend on the result's last axis",
        lambda m, x: F.linear(x, m.w).view(3, 8).flip(0),
        (numbers(4, 8),),
    ),
    "rows": (
        "a matmul operand that depends on more than its rows",
        lambda m, x: (y := F.linear(x, m.w)) - y.mean(0),
        (numbers(4, 8),),
    ),
    "columns": (
        "a matmul operand that depends on more than its columns",
        lambda m, x: (y := F.linear(x, m.w)) - y.mean(-1, keepdim=True),
        (numbers(4, 8),),
    ),
    "twice": (
        "the result of a matmul is read at two places, so it would be computed twice",
        lambda m, x: (y := F.linear(x, m.w)) + y.flip(1),
        (numbers(4, 8),),
    ),
    "weight": (
        "a reduction inside the weight operand of a matmul",
        lambda m, x: F.linear(x, F.softmax(m.w, -1)),
        (numbers(4, 8),),
    ),
    "result": (
        "a reduction over the result of a matmul, which stands in other tiles",
        lambda m, x: (y := F.linear(x, m.w)) + y.unsqueeze(-1).expand(4, 6, 3).sum(-1),
        (numbers(4, 8),),
    ),
    "nested": (
        r"a reduction inside another reduction's loop \(k\d+\)",
        lambda m, x: F.linear(x - F.softmax(x, -1).sum(0), m.w),
        (numbers(4, 8),),
    ),
    "columns_in_rows": (
        r"a reduction inside another reduction's loop \(i\d+\)",
        lambda m, x, y: F.linear(x, m.w) + y.sum(0),
        (numbers(4, 8), numbers(5, 6)),
    ),
}


@pytest.mark.parametrize("case", MATMUL_REFUSALS)
def test_refusals_of_matmuls(case: str) -> None:
    reason, function, inputs = MATMUL_REFUSALS[case]
    with pytest.raises(Unsupported, match=f"^{reason}$"):
        lower(function, *inputs, w=WEIGHT, square=numbers(6, 6))


# -- attention ------------------------------------------------------------------------------------------------


def test_an_attention_with_work_on_the_query_and_on_the_result() -> None:
    kernel = joined(lambda m, q, k, v: attend(q * 2, k, v).transpose(1, 2).reshape(1, 3, 8) + 1, *HEADS)
    part = only_part(kernel)
    assert isinstance(part, AttentionPart) and isinstance(part.attend.term, Attend)
    assert [int(a.extent) for a in (*part.batch, part.t, part.feature)] == [1, 2, 3, 4]
    batch, head, feature = part.batch[0], part.batch[1], part.feature
    at = {batch.symbol: 0, head.symbol: 1, part.t.symbol: 2, feature.symbol: 3}
    assert [index.subs(at) for index in part.stores[0].index] == [0, 2, 7]


def test_an_attention_in_16_bits_reads_its_keys_widened() -> None:
    lowered = lower(lambda m, q, k, v: attend(q, k, v), *(x.bfloat16() for x in HEADS))
    (part,) = lowered.kernel.parts
    assert isinstance(part, AttentionPart)


def test_an_attention_with_a_computed_mask() -> None:
    joined(lambda m, q, k, v, mask: attend(q, k, v, mask * 3), *HEADS, numbers(1, 1, 3, 5, seed=3))


def test_grouped_heads_read_their_group() -> None:
    q = numbers(1, 4, 3, 4, seed=5)
    joined(lambda m, q, k, v: attend(q, k, v), q, *HEADS[1:])


OF_ANOTHER = torch.zeros(1, 2, 3, 4, dtype=torch.int64)
ATTENTION_REFUSALS: dict[str, tuple[str, Function, tuple[Tensor, ...]]] = {
    "two": ("2 attentions in one kernel part", lambda m, q, k, v: attend(q, k, v) + attend(q + 1, k, v), ()),
    "norm": (
        "a reduction or a matmul in one kernel part with an attention",
        lambda m, q, k, v: attend(F.rms_norm(q, (4,)), k, v),
        (),
    ),
    "keys": (
        "work on the keys of an attention would be done again for every tile of queries",
        lambda m, q, k, v: attend(q, k.exp(), v),
        (),
    ),
    "values": (
        "work on the values of an attention would be done again for every tile of queries",
        lambda m, q, k, v: attend(q, k, v * 2),
        (),
    ),
    "query axes": (
        "the query of an attention depend on more than their own axes",
        lambda m, q, k, v: attend(q, k, v).view(1, 3, 8).flip(1),
        (),
    ),
    "key axes": (
        "the keys of an attention depend on more than their own axes",
        lambda m, q, k, v, i: attend(q[:, :1].expand(1, 2, 3, 4), k, v).gather(1, i),
        (OF_ANOTHER,),
    ),
    "value axes": (
        "the values of an attention depend on more than their own axes",
        lambda m, q, k, v, i: attend(q, k, v).gather(3, i),
        (OF_ANOTHER,),
    ),
    "mask axes": (
        "the mask of an attention depend on more than their own axes",
        lambda m, q, k, v, mask, i: attend(q[:, :, :1].expand(1, 2, 3, 4), k, v, mask).gather(2, i),
        (numbers(1, 1, 3, 5), OF_ANOTHER),
    ),
}


@pytest.mark.parametrize("case", ATTENTION_REFUSALS)
def test_refusals_of_attention(case: str) -> None:
    reason, function, more = ATTENTION_REFUSALS[case]
    with pytest.raises(Unsupported, match=f"^{reason}$"):
        lower(function, *HEADS, *more)
