"""Independent small groups in one launch: fires, refuses clause by clause, keeps the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import EAGER_TO_FUSE, FusionCase, numbers, reasons
from torchweld.graph.fusion import weigh
from torchweld.graph.rewrite import Refusal
from torchweld.passes import fuse_horizontal


def waited_for_together(dynamic: bool = False) -> FusionCase:
    """The norms of two tensors that one attention waits for."""

    def attend(m: Any, q: Tensor, k: Tensor) -> Tensor:
        return torch.cumsum(F.rms_norm(q, (8,)) @ F.rms_norm(k, (8,), m.g).mT, -1)

    return FusionCase(attend, numbers(2, 5, 8), numbers(2, 3, 8), dynamic=dynamic, g=numbers(8))


def test_joins_what_a_common_reader_waits_for() -> None:
    case = waited_for_together()
    outcome = case.fuse(fuse_horizontal)
    assert outcome.applied == 1
    assert case.ops() == ["rms_norm rms_norm", "matmul", "cumsum"]
    kernel = case.kernel("rms_norm")
    assert len(kernel.parts) == 2, "different extents: each norm has a grid of its own"
    assert outcome.saved > 0.99 * EAGER_TO_FUSE.launch_us
    case.assert_fused_numbers()


def test_joins_what_waits_for_a_common_producer() -> None:
    """The two groups read one value through different views and share no tensor that both need whole."""
    case = FusionCase(lambda m, x: ((c := torch.cumsum(x, 0))[:, :4].exp(), c[:, 4:].neg()), numbers(5, 8))
    assert case.fuse(fuse_horizontal).applied == 1
    assert case.ops() == ["cumsum", "exp neg"]
    case.assert_fused_numbers()


def test_equal_extents_share_a_loop() -> None:
    case = FusionCase(
        lambda m, x, y: torch.cumsum(x.exp(), 0) @ torch.cumsum(y.neg(), 0), numbers(4, 4), numbers(4, 4)
    )
    assert case.fuse(fuse_horizontal).applied == 0, "no common reader, no common producer"
    sub = FusionCase(
        lambda m, x, y: torch.cumsum(torch.bmm(x.exp(), y.neg()), 0), numbers(2, 4, 4), numbers(2, 4, 4)
    )
    sub.fuse(fuse_horizontal)
    assert sub.ops() == ["exp neg", "bmm", "cumsum"]
    assert len(sub.kernel("exp").parts) == 1
    sub.assert_fused_numbers()


def test_keeps_the_numbers_at_other_sizes() -> None:
    case = waited_for_together(dynamic=True)
    case.fuse(fuse_horizontal)
    assert "rms_norm rms_norm" in case.ops()
    case.assert_fused_numbers(numbers(3, 1, 8), numbers(3, 4, 8))


def three_for_one() -> FusionCase:
    """Three small groups that one reader waits for."""

    def function(m: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.addcmul(x.exp(), y.neg(), z.sin())

    return FusionCase(function, numbers(4, 4), numbers(4, 4), numbers(4, 4))


def test_finds_moves_around_a_new_group() -> None:
    case = three_for_one()
    assert case.fuse(fuse_horizontal).applied == 2
    assert case.ops() == ["exp neg sin", "addcmul"]
    case.assert_fused_numbers()


def test_find_yields_only_moves_of_the_new_group() -> None:
    case = three_for_one()
    first, second, third = (case.group_of(op).id for op in ("exp", "neg", "sin"))
    pairs = {(first, second), (first, third), (second, third)}
    assert set(fuse_horizontal.find(case.groups)) == pairs
    assert set(fuse_horizontal.find(case.groups, third)) == pairs - {(first, second)}
    assert set(fuse_horizontal.find(case.groups, case.group_of("addcmul").id)) == set(), "it has no sibling"


def test_refuses_an_eager_member() -> None:
    case = FusionCase(lambda m, x, y: torch.cumsum(x, 0) @ y.exp(), numbers(4, 4), numbers(4, 4))
    outcome = case.fuse(fuse_horizontal)
    assert reasons(outcome) == {"runs eagerly: aten.cumsum.default: no rule gives its elements": 1}


def test_refuses_a_cycle() -> None:
    """The sum waits for exp and for neg; neg waits for exp through cumsum."""
    case = FusionCase(lambda m, x: (e := x.exp()) + torch.cumsum(e, 0).neg(), numbers(4, 4))
    outcome = case.fuse(fuse_horizontal)
    assert reasons(outcome)["would make a cycle: another group stands between them"] == 1
    assert case.ops() == ["exp", "cumsum", "neg", "add"]
    case.assert_fused_numbers()


def test_refuses_one_that_waits_for_the_other() -> None:
    """A direct edge makes no cycle, but a producer and its consumer are not independent, whichever comes first."""
    case = FusionCase(lambda m, x: (e := x.exp()) @ e.neg(), numbers(4, 4))
    outcome = case.fuse(fuse_horizontal)
    assert reasons(outcome)["one waits for the other"] >= 1
    assert case.ops() == ["exp", "neg", "matmul"]
    exp, neg = case.group_of("exp").id, case.group_of("neg").id
    for move in ((exp, neg), (neg, exp)):
        refusal = fuse_horizontal.check(case.groups, move)
        assert refusal is not None and refusal.reason == "one waits for the other"


def test_refuses_a_group_that_is_large() -> None:
    """One of the two takes 10 launches: a shared launch does not matter."""
    slow = replace(EAGER_TO_FUSE, read_gb_s=8 * 64 * 64 / 200 / 1e3)
    case = FusionCase(
        lambda m, x, y: torch.cumsum(x.exp() * y.neg()[:1, :1], 0),
        numbers(64, 64),
        numbers(4, 4),
        target=slow,
    )
    exp, neg = case.group_of("exp").id, case.group_of("neg").id
    assert case.groups.cost(exp) > 8 * 20.0 > case.groups.cost(neg)
    outcome = case.fuse(fuse_horizontal)
    assert reasons(outcome) == {"too large for a shared launch to matter": 1}
    assert fuse_horizontal.check(case.groups, (neg, exp)) is not None
    assert case.ops()[:2] == ["exp", "neg"]


def test_refuses_a_pair_without_a_kernel() -> None:
    """Four and five pieces: nine loops with a grid of their own, and a kernel has at most eight."""

    def product(m: Any, x: Tensor, y: Tensor) -> Tensor:
        left = torch.cat([y.narrow(0, i, 1) for i in (4, 1, 3, 0, 2)], 0)
        right = torch.cat([x.narrow(1, i, 1) for i in (3, 1, 0, 2)], 1)
        return torch.cumsum(left @ right, 0)

    case = FusionCase(product, numbers(3, 4), numbers(5, 3))
    outcome = case.fuse(fuse_horizontal)
    assert reasons(outcome) == {"9 loop structures in one kernel, at most 8": 1}
    assert case.ops() == ["cat", "cat", "matmul", "cumsum"]


def test_refuses_what_does_not_pay() -> None:
    """In one loop over (i, j), the norm over the last two dimensions would be summed again for every j."""
    case = FusionCase(
        lambda m, x, y: torch.bmm(F.layer_norm(x, (64, 8)).mT, F.softmax(y, -1)),
        numbers(4, 64, 8), numbers(4, 64, 8), target=replace(EAGER_TO_FUSE, f32_gflops=1.0),
    )  # fmt: skip
    outcome = case.fuse(fuse_horizontal)
    assert reasons(outcome) == {"does not pay by the cost model": 1}
    assert case.ops() == ["layer_norm", "softmax", "bmm"]


def test_a_legal_move_has_a_gain() -> None:
    case = waited_for_together()
    (move,) = set(fuse_horizontal.find(case.groups))
    gain = weigh(case.groups, fuse_horizontal, move)
    assert not isinstance(gain, Refusal) and gain >= EAGER_TO_FUSE.launch_us


def test_golden(golden: Callable[[str, str], None]) -> None:
    case = waited_for_together()
    case.fuse(fuse_horizontal)
    golden("fuse_horizontal/two_norms.txt", case.text())
