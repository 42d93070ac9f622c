"""The arena: values that live at the same time never overlap, dead places are reused, everything is aligned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchweld.codegen.plan_memory import ALIGNMENT, Lifetime, plan_memory

lifetimes = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 6)).map(
        lambda t: (t[0], t[1], t[1] + t[2])
    ),
    max_size=25,
).map(lambda rows: [Lifetime(f"v{n}", *row) for n, row in enumerate(rows)])


@given(lifetimes)
def test_values_alive_together_do_not_overlap(values: list[Lifetime]) -> None:
    plan = plan_memory(values)
    for i, a in enumerate(values):
        assert plan.offsets[a.name] % ALIGNMENT == 0
        assert plan.offsets[a.name] + a.nbytes <= plan.arena_bytes or a.nbytes == 0
        for b in values[:i]:
            together = a.first <= b.last and b.first <= a.last
            start, end = plan.offsets[a.name], plan.offsets[a.name] + a.nbytes
            apart = end <= plan.offsets[b.name] or plan.offsets[b.name] + b.nbytes <= start
            assert apart or not together or not a.nbytes or not b.nbytes, (a, b, plan)


def test_a_chain_needs_two_places() -> None:
    chain = [Lifetime(f"v{n}", 1000, n, n + 1) for n in range(10)]
    plan = plan_memory(chain)
    assert plan.arena_bytes == 2 * 1024
    assert plan.total_bytes == 10 * 1024


def test_the_tightest_gap_is_taken() -> None:
    values = [
        Lifetime("large", 640, 0, 3), Lifetime("wall", 64, 1, 9), Lifetime("small", 128, 2, 3),
        Lifetime("end", 64, 3, 9), Lifetime("late", 128, 4, 9),
    ]  # fmt: skip
    plan = plan_memory(values)
    assert plan.offsets["late"] == plan.offsets["small"]
    assert plan.arena_bytes == 640 + 64 + 128 + 64


def test_nothing_needs_nothing() -> None:
    assert plan_memory([]).arena_bytes == 0
    assert plan_memory([Lifetime("empty", 0, 0, 3)]).arena_bytes == 0
