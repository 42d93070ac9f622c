"""Which weights were looked into: values count, shapes do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchweld.graph.edit import fake_weight
from torchweld.graph.value_reads import ValueReads, digest_values

Look = Callable[[Tensor], object]
LOOKING: list[Look] = [
    lambda t: t.tolist(), lambda t: t.sum().item(), lambda t: t + 1, lambda t: t[1:].numpy(),
    lambda t: torch.equal(t, t), lambda t: bool((t > 0).all()), lambda t: torch.ops.aten.add.Tensor(t, 1),
    lambda t: t.detach()[0].item(), lambda t: float(t.data[2]), lambda t: torch.stack([torch.ones(4), t]),
    lambda t: list(t), lambda t: torch.where(t > 1, t, 0),
]  # fmt: skip
NOT_LOOKING: list[Look] = [
    lambda t: t.shape, lambda t: t.dtype, lambda t: t.numel(), lambda t: t.dim(), lambda t: t.is_contiguous(),
    lambda t: t.detach().contiguous(), lambda t: t.data_ptr(), lambda t: t.stride(), lambda t: t.device,
    lambda t: isinstance(t, torch.nn.Parameter), lambda t: t.is_floating_point(), lambda t: torch.ones(3) * 2,
    lambda t: len(t), lambda t: t.is_inference(), lambda t: fake_weight(FakeTensorMode(), t),
]  # fmt: skip


@pytest.mark.parametrize("look", LOOKING)
def test_looking_at_values_is_noted(look: Look) -> None:
    weight, other = torch.arange(4.0), torch.arange(4.0)
    with ValueReads({"weight": weight, "other": other}) as reads:
        look(weight)
    assert reads.names == {"weight"}


@pytest.mark.parametrize("ask", NOT_LOOKING)
def test_asking_for_shapes_is_not(ask: Look) -> None:
    weight = torch.arange(4.0)
    with ValueReads({"weight": weight}) as reads:
        ask(weight)
    assert reads.names == set()


def test_parts_of_a_tensor_and_tied_tensors_count() -> None:
    whole = torch.arange(10.0)
    tensors = {"whole": whole, "tied": whole, "front": whole[:3], "back": whole[6:]}
    part = whole[7:]
    with ValueReads(tensors) as reads:
        part.sum()
    assert reads.names == {"whole", "tied", "back"}


def test_digests_follow_the_values() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert digest_values(values) == digest_values(values.t().contiguous().t())
    assert digest_values(values) != digest_values(values + 1)
    assert digest_values(torch.tensor(True)) != digest_values(torch.tensor(False))
