"""Running values and scans in the sequence-axis analysis: what is carried, what is local, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import associative_scan, scan

from tests.graph.test_sequence import WIDTH, Mix, analysed, refused
from torchweld.graph.sequence import Along
from torchweld.graph.sequence_scans import RUNNING, part_users, values_dtype


def decay(x: Tensor, init: Tensor | None = None, dim: int = 1, **options: Any) -> Tensor:
    """An exponential average over `dim`."""
    first = torch.zeros(x.shape[0], WIDTH) if init is None else init
    return scan(lambda h, row: (h * 0.5 + row, h * 0.25), first, x, dim=dim, **options)[1]  # type: ignore[no-any-return]


CARRIED: dict[str, tuple[Mix, int]] = {
    "cumprod": (lambda m, ids, x: x.cumprod(1), 1),
    "logcumsumexp": (lambda m, ids, x: x.logcumsumexp(1), 1),
    "cummax": (lambda m, ids, x: x.cummax(1).values, 1),
    "cummin of the transpose": (lambda m, ids, x: x.transpose(1, 2).cummin(-1).values.transpose(1, 2), 2),
    "of several heads": (
        lambda m, ids, x: x.reshape(x.shape[0], x.shape[1], 2, -1).transpose(1, 2).flatten(0, 1).cumprod(1)
        .unflatten(0, (x.shape[0], 2)).transpose(1, 2).flatten(2), 1,
    ),
    "scan": (lambda m, ids, x: decay(x), 0),
    "scan from what is like a row": (lambda m, ids, x: decay(x, torch.zeros_like(x[:, 0])), 0),
    "scan from something learned": (lambda m, ids, x: decay(x, m.places[0].expand(x.shape[0], WIDTH).clone()), 0),
    "associative scan": (lambda m, ids, x: associative_scan(torch.add, x, 1, combine_mode="generic"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
def test_what_looks_back_is_carried(name: str) -> None:
    mix, axis = CARRIED[name]
    found = analysed(mix)
    (node,) = found.carried
    assert found.along[node] == Along(axis, tokens=True)
    assert found.looking_back == (node, *found.attentions)


@pytest.mark.parametrize("target", RUNNING)
def test_over_features_nothing_is_carried(target: Any) -> None:
    def mix(module: torch.nn.Module, ids: Tensor, x: Tensor) -> Tensor:
        found = target(x, 2)
        return found if isinstance(found, Tensor) else found[0]  # type: ignore[no-any-return]

    assert analysed(mix).carried == ()


def test_pieces_and_dtypes() -> None:
    found = analysed(lambda m, ids, x: x + (ids > 2).cummax(1).values[..., None])
    (node,) = found.carried
    assert values_dtype(node) == torch.bool
    assert len(part_users(node, 0)) == 1 and part_users(node, 1) == []


REFUSED: dict[str, tuple[Mix, str, str]] = {
    "product through the batch": (
        lambda m, ids, x: x.reshape(-1, WIDTH).cumprod(0).reshape(x.shape), "cumprod", "one behind the other",
    ),
    "complex product": (
        lambda m, ids, x: x.to(torch.complex64).cumprod(1).abs(), "cumprod", "complex numbers has no state rule",
    ),
    "maximum from the end": (lambda m, ids, x: x.flip(1).cummax(1).values.flip(1), "flip", "S - 1 - t"),
    "scan from the end": (lambda m, ids, x: decay(x, reverse=True), "flip", "S - 1 - t"),
    "scan over features": (
        lambda m, ids, x: decay(x, torch.zeros(x.shape[0], x.shape[1]), dim=2), "torchweld.scan",
        "over another axis than the sequence",
    ),
    "scan through the batch": (
        lambda m, ids, x: decay(x.reshape(1, -1, WIDTH)).reshape(x.shape), "torchweld.scan", "one behind the other",
    ),
    "scan from the first token": (lambda m, ids, x: decay(x, x[:, 0] * 2), "select", "one position of the sequence"),
    "last carry": (
        lambda m, ids, x: scan(
            lambda h, row: (h + row, h * 2), torch.zeros(x.shape[0], WIDTH), x, dim=1
        )[0][:, None] + x,
        "select", "one position of the sequence axis",
    ),
    "scan over a table, of all tokens": (
        lambda m, ids, x: scan(
            lambda h, row: ((h * row).sin(), h * 2), x.clone(), m.places, dim=0,
        )[1][-1], "torchweld.scan", "over another axis than the sequence",
    ),
    "scan that closes over all tokens": (
        lambda m, ids, x: scan(
            lambda h, row: (h + row, (h[:, None] * x).sum(1)), torch.zeros(x.shape[0], WIDTH), x, dim=1
        )[1], "torchweld.scan", "closes over a value of all positions, embedding",
    ),
    "scan that begins with all tokens": (
        lambda m, ids, x: scan(lambda h, row: (h * 0.5, h.mean(1) + row), x.clone(), x, dim=1)[1],
        "torchweld.scan", "begins with a value of all positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_node(name: str) -> None:
    mix, target, reason = REFUSED[name]
    refusal = refused(mix)
    assert refusal.node is not None
    assert target in str(refusal.node.target)
    assert reason in refusal.reason
