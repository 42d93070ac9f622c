"""Which tensors count their changes together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchweld.codegen.version_counters import one_of_each_counter, version_of


@given(owners=st.lists(st.integers(0, 4), max_size=12), writes=st.lists(st.integers(0, 4), max_size=5))
def test_one_tensor_of_each_counter(owners: list[int], writes: list[int]) -> None:
    bases = [torch.zeros(8) for _ in range(5)]
    for number in writes:
        bases[number].add_(1)
    kinds = (
        lambda t: t[2:4],
        lambda t: nn.Parameter(t, requires_grad=False),
        lambda t: t.detach().view(2, 4),
    )
    tensors = [kinds[place % 3](bases[number]) for place, number in enumerate(owners)]
    before = list(map(version_of, tensors))
    found = one_of_each_counter(tensors)
    assert list(map(version_of, tensors)) == before
    assert len(found) == len(set(owners))
    assert {id(tensor) for tensor in found} <= {id(tensor) for tensor in tensors}
    for number in set(owners):
        sums = sum(map(version_of, found))
        bases[number].mul_(2)
        assert sum(map(version_of, found)) == sums + 1


def test_the_same_memory_with_a_counter_of_its_own() -> None:
    one = torch.zeros(3)
    other = one.data
    assert len(one_of_each_counter([one, other])) == 2
