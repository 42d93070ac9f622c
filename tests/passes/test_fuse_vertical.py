"""Producer and consumer in one kernel: fires, refuses clause by clause, keeps the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import NO_RECOMPUTATION, FusionCase, numbers, reasons
from torchweld.graph.fusion import weigh
from torchweld.graph.ops import attention as _attention_op  # noqa: F401  registers torchweld::attention
from torchweld.passes import fuse_vertical


def gated() -> FusionCase:
    return FusionCase(
        lambda m, x, r: F.silu(F.linear(x, m.w)) + r,
        numbers(2, 5, 8),
        numbers(2, 5, 6, seed=1),
        w=numbers(6, 8),
    )


def test_joins_what_follows_a_matmul() -> None:
    case = gated()
    outcome = case.fuse(fuse_vertical)
    assert (outcome.matched, outcome.applied, outcome.refused) == (3, 2, ())
    assert case.ops() == ["linear silu add"]
    assert [buffer.name for buffer in case.kernel("linear").buffers] == [
        "inputs_0",
        "w",
        "inputs_1",
        "add_out",
    ]
    case.assert_fused_numbers()


def test_saves_what_the_cost_model_says() -> None:
    case = gated()
    before = sum(map(case.groups.cost, case.groups.groups))
    outcome = case.fuse(fuse_vertical)
    assert abs(outcome.saved - (before - sum(map(case.groups.cost, case.groups.groups)))) < 1e-9
    assert outcome.saved > 2 * 20.0, "two launches and the bytes of two values less"


def test_joins_a_norm_with_the_matmul_behind_it() -> None:
    case = FusionCase(
        lambda m, x: F.linear(F.rms_norm(x, (8,), m.g), m.w), numbers(2, 5, 8), w=numbers(6, 8), g=numbers(8)
    )
    assert case.fuse(fuse_vertical).applied == 1
    assert case.ops() == ["rms_norm linear"]
    case.assert_fused_numbers()


def test_prefers_work_behind_a_matmul_to_work_in_front_of_one() -> None:
    """`rank`: h is stored anyway, so joining silu with the second linear saves more; but it would be done twice."""

    def blocks(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.linear(x, m.w)
        return h, F.linear(F.silu(h), m.v)

    case = FusionCase(blocks, numbers(5, 8), w=numbers(8, 8), v=numbers(8, 8, seed=1))
    gains = [weigh(case.groups, fuse_vertical, move) for move in fuse_vertical.find(case.groups)]
    assert isinstance(gains[0], float) and isinstance(gains[1], float) and gains[0] < gains[1]
    case.fuse(fuse_vertical)
    assert case.ops() == ["linear silu", "linear"]
    case.assert_fused_numbers()


def test_prefers_the_matmul_to_what_selects_from_the_work_behind_it() -> None:
    """`rank`: a sum of chosen rows could not be joined with the matmul, which makes all of them (the last layer of a
    step, whose logits are wanted for some rows). By its gain alone the join with the norm would come first."""

    def last_layer(m: Any, x: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        h = F.linear(x, m.w) + r
        return F.linear(F.rms_norm(h.index_select(0, rows), (6,), m.g), m.v)

    case = FusionCase(
        last_layer, numbers(5, 8), numbers(5, 6, seed=1), torch.tensor([4, 1]),
        w=numbers(6, 8), g=numbers(6), v=numbers(4, 6, seed=2),
    )  # fmt: skip
    case.fuse(fuse_vertical)
    assert case.ops() == ["linear add", "index_select rms_norm linear"]
    case.assert_fused_numbers()


def test_a_value_with_other_readers_is_still_stored() -> None:
    case = FusionCase(lambda m, x: (h := torch.exp(x), torch.cumsum(torch.neg(h), 0)), numbers(3, 4))
    assert case.fuse(fuse_vertical).applied == 1
    assert case.ops() == ["exp neg", "cumsum"]
    assert [node.name for node in case.group_of("exp").outputs] == ["exp", "neg"]
    case.assert_fused_numbers()


def test_keeps_the_numbers_at_other_sizes() -> None:
    case = FusionCase(
        lambda m, x: F.softmax(F.linear(x, m.w).transpose(0, 1) * 2, -1),
        numbers(2, 5, 8),
        dynamic=True,
        w=numbers(6, 8),
    )
    case.fuse(fuse_vertical)
    case.assert_fused_numbers(numbers(3, 1, 8, seed=3))


def test_refuses_an_eager_member() -> None:
    case = FusionCase(lambda m, x: torch.cumsum(x.neg(), 0).exp(), numbers(3, 4))
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome) == {"runs eagerly: aten.cumsum.default: no rule gives its elements": 2}
    assert case.ops() == ["neg", "cumsum", "exp"]
    case.assert_fused_numbers()


def test_refuses_a_cycle() -> None:
    """exp and add must not join while cumsum stands between them."""
    case = FusionCase(lambda m, x: (e := x.exp()) + torch.cumsum(e, 0), numbers(3, 4))
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome)["would make a cycle: another group stands between them"] == 1
    assert case.ops() == ["exp", "cumsum", "add"]
    assert all(refusal.node is not None for refusal, _ in outcome.refused), "refused before it is a candidate"
    case.assert_fused_numbers()


def test_refuses_two_anchors() -> None:
    case = FusionCase(
        lambda m, x: F.linear(F.linear(x, m.w), m.v), numbers(5, 8), w=numbers(8, 8), v=numbers(8, 8, seed=1)
    )
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome) == {"two anchors: input or output fusion joins those": 1}
    assert case.ops() == ["linear", "linear"]
    ((refusal, _),) = outcome.refused
    assert refusal.node is not None and refusal.node.name == "linear_1"


def test_an_attention_is_an_anchor() -> None:
    def project(m: Any, q: Tensor, k: Tensor) -> Tensor:
        attended: Tensor = torch.ops.torchweld.attention(q, k, k, None, "none", 0, 0.5, 0.0)
        return F.linear(attended, m.w)

    case = FusionCase(project, numbers(1, 2, 3, 4), numbers(1, 2, 5, 4), w=numbers(6, 4))
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome) == {"two anchors: input or output fusion joins those": 1}


@pytest.mark.parametrize("join", [torch.cat, torch.concat, torch.stack])
def test_refuses_a_concatenation(join: Callable[..., Tensor]) -> None:
    case = FusionCase(lambda m, x, y: join([x.exp(), y], -1), numbers(5, 8), numbers(5, 8))
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome) == {"the consumer is a concatenation: output fusion joins its writers": 1}
    assert len(case.ops()) == 2


def test_refuses_a_pair_without_a_kernel() -> None:
    case = FusionCase(lambda m, x: F.softmax(F.linear(x, m.w), -1), numbers(5, 8), w=numbers(6, 8))
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome) == {"a reduction or a selection over the result of a matmul or an attention": 1}
    assert case.ops() == ["linear", "softmax"]


def test_refuses_what_does_not_pay() -> None:
    """Each of the 64 cores would compute the rows' tanh again."""
    case = FusionCase(
        lambda m, x: F.linear(x.tanh(), m.w), numbers(64, 64), target=NO_RECOMPUTATION, w=numbers(2, 64)
    )
    outcome = case.fuse(fuse_vertical)
    assert reasons(outcome) == {"does not pay by the cost model": 1}
    assert case.ops() == ["tanh", "linear"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    case = FusionCase(
        lambda m, x, r: F.silu(F.linear(F.rms_norm(x, (8,), m.g), m.w, m.b)) + r,
        numbers(2, 5, 8), numbers(2, 5, 6), w=numbers(6, 8), g=numbers(8), b=numbers(6),
    )  # fmt: skip
    case.fuse(fuse_vertical)
    golden("fuse_vertical/norm_linear_silu_add.txt", case.text())
