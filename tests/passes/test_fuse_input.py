"""Groups with a common input in one kernel: fires, refuses clause by clause, keeps the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import NO_RECOMPUTATION, FusionCase, numbers, reasons
from torchweld.codegen.ir import MatmulPart
from torchweld.graph.fusion import weigh
from torchweld.passes import fuse_input, fuse_vertical


def query_key_value() -> FusionCase:
    """Three linears of different widths that read one tensor."""

    def project(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, m.q), F.linear(x, m.k), F.linear(x, m.v)

    return FusionCase(project, numbers(2, 5, 8), q=numbers(12, 8), k=numbers(4, 8), v=numbers(4, 8, seed=1))


def test_joins_query_key_and_value() -> None:
    case = query_key_value()
    assert case.fuse(fuse_input).applied == 2
    assert case.ops() == ["linear linear linear"]
    kernel = case.kernel("linear")
    assert [part.n.extent for part in kernel.parts if isinstance(part, MatmulPart)] == [12, 4, 4]
    assert [buffer.name for buffer in kernel.buffers].count("inputs_0") == 1, "x is one buffer of the kernel"
    case.assert_fused_numbers()


def test_the_new_group_takes_part_in_further_moves() -> None:
    """`find(around)`: three pairs at first, and one of the new group with the third."""
    outcome = query_key_value().fuse(fuse_input)
    assert (outcome.matched, outcome.refused) == (4, ())


def test_find_yields_only_moves_of_the_new_group() -> None:
    case = query_key_value()
    first, second, third = sorted(case.groups.groups)
    assert set(fuse_input.find(case.groups)) == {(first, second), (first, third), (second, third)}
    assert set(fuse_input.find(case.groups, third)) == {(first, third), (second, third)}


def test_a_common_producer_counts_as_a_common_input() -> None:
    case = FusionCase(
        lambda m, x: ((n := F.rms_norm(x, (8,))).exp(), torch.cumsum(n.neg().amax(0), 0)), numbers(2, 5, 8)
    )
    case.fuse(fuse_input)
    assert case.ops() == ["rms_norm", "exp neg", "amax", "cumsum"]
    case.assert_fused_numbers()


def test_a_norm_joins_the_siblings_that_read_it() -> None:
    """Why siblings are joined first: the norm then has one reader."""

    def project(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        n = F.rms_norm(x, (8,), m.g)
        return F.linear(n, m.q), F.linear(n, m.k)

    case = FusionCase(project, numbers(2, 5, 8), q=numbers(12, 8), k=numbers(4, 8), g=numbers(8))
    case.fuse(fuse_input, fuse_vertical)
    assert case.ops() == ["rms_norm linear linear"]
    case.assert_fused_numbers()


def test_keeps_the_numbers_at_other_sizes() -> None:
    def project(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, m.q).relu(), F.softmax(x, 1)

    case = FusionCase(project, numbers(2, 5, 8), dynamic=True, q=numbers(12, 8))
    case.fuse(fuse_input)
    case.assert_fused_numbers(numbers(1, 3, 8, seed=3))


def test_refuses_an_eager_member() -> None:
    case = FusionCase(lambda m, x: (x.exp(), torch.cumsum(x, 0)), numbers(3, 4))
    outcome = case.fuse(fuse_input)
    assert reasons(outcome) == {"runs eagerly: aten.cumsum.default: no rule gives its elements": 1}
    assert sorted(case.ops()) == ["cumsum", "exp"]


def test_refuses_a_cycle() -> None:
    """Neither may wait for the other through a third group: exp -> cumsum -> add, and both ends read x."""
    case = FusionCase(lambda m, x: torch.cumsum(x.exp(), 0) + x, numbers(3, 4))
    outcome = case.fuse(fuse_input)
    assert reasons(outcome) == {"would make a cycle: another group stands between them": 1}
    assert case.ops() == ["exp", "cumsum", "add"]
    assert all(refusal.node is not None for refusal, _ in outcome.refused), "refused before it is a candidate"


def test_refuses_a_common_weight() -> None:
    case = FusionCase(
        lambda m, x, y: (F.linear(x, m.w), F.linear(y, m.w)), numbers(2, 8), numbers(3, 8), w=numbers(6, 8)
    )
    outcome = case.fuse(fuse_input)
    assert reasons(outcome) == {"they share a weight only, which both read row by row": 1}
    assert case.ops() == ["linear", "linear"]


def test_joins_readers_of_a_weight_and_a_tensor() -> None:
    """The refusal is about pairs that share nothing else."""
    case = FusionCase(lambda m, x: (x * m.w, x + m.w), numbers(5, 8), w=numbers(8))
    assert case.fuse(fuse_input).applied == 1
    assert case.ops() == ["mul add"]


def test_refuses_a_pair_without_a_kernel() -> None:
    """Two matmuls that follow each other both read x."""
    w, v = numbers(8, 8), numbers(8, 8, seed=1)
    case = FusionCase(lambda m, x: F.linear(F.linear(x, m.w) + x, m.v) + x, numbers(8, 8), w=w, v=v)
    case.fuse(fuse_vertical)
    assert case.ops() == ["linear add", "linear add"]
    outcome = case.fuse(fuse_input)
    assert reasons(outcome) == {"a matmul whose operand is a matmul": 1}
    assert case.ops() == ["linear add", "linear add"]


def test_refuses_what_does_not_pay() -> None:
    """Both read x, but in one kernel each of the 64 cores computes the rows' tanh again."""
    case = FusionCase(lambda m, x: x.tanh() @ x.mT, numbers(4, 2, 64), target=NO_RECOMPUTATION)
    outcome = case.fuse(fuse_input)
    assert reasons(outcome) == {"does not pay by the cost model": 1}
    assert case.ops() == ["tanh", "matmul"]


def test_refuses_what_is_slower_as_measured() -> None:
    case = query_key_value()
    outcome = case.fuse(fuse_input, measure=lambda groups, lowered: 1.0 + lowered.work.parts**2)
    assert reasons(outcome) == {"slower as measured": 3}


def test_all_moves_are_of_one_rank() -> None:
    case = query_key_value()
    moves = list(fuse_input.find(case.groups))
    assert {fuse_input.rank(case.groups, move) for move in moves} == {0}
    assert all(isinstance(weigh(case.groups, fuse_input, move), float) for move in moves)


def test_golden(golden: Callable[[str, str], None]) -> None:
    case = query_key_value()
    case.fuse(fuse_input)
    golden("fuse_input/query_key_value.txt", case.text())
