"""canonicalize_lookups: a gather of whole rows is an embedding; other gathers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.passes.support import Case, aten, draw
from torchweld.passes import canonicalize_lookups, canonicalize_views

PASSES = (canonicalize_views, canonicalize_lookups)
TABLE = draw(16, 4, seed=3)


def places(ids: Any) -> Any:
    return torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, ids: torch.gather(m.table.repeat(ids.shape[0], 1, 1), 1, ids[..., None].repeat(1, 1, 4)),
        lambda m, ids: torch.gather(
            m.table[None].expand(ids.shape[0], -1, -1), 1, ids[..., None].expand(-1, -1, 4)
        ),
        lambda m, ids: torch.gather(m.table[None], 1, ids[:1, :, None].expand(-1, -1, 4)),
    ],
)
def test_fires(function: Any) -> None:
    case = Case(function, torch.arange(14).reshape(2, 7), table=TABLE)
    outcome = case.run(*PASSES)[-1]
    assert (outcome.applied, outcome.refused) == (1, ())
    assert case.count(aten.embedding.default) == 1 and case.count(aten.gather.default) == 0
    case.assert_same_numbers()
    case.assert_same_numbers(torch.tensor([[3, 1, 15, 0]]))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, ids: torch.gather(m.table[None], 1, ids[:1, :, None].expand(-1, -1, 3)),  # fewer columns
        lambda m, ids: torch.gather(
            m.table[None], 1, (ids[:1, :, None] + m.columns) % 16
        ),  # column by column
        lambda m, ids: torch.gather(
            m.table[None], 2, (ids[:1, :, None] % 4).expand(-1, -1, 4)
        ),  # along columns
        lambda m, ids: torch.gather(
            m.tables, 1, ids[..., None].expand(-1, -1, 4)
        ),  # a table per row of the batch
        lambda m, ids: torch.gather(m.table, 0, ids[0, :, None].expand(-1, 4)),
    ],
)
def test_leaves_other_gathers(function: Any) -> None:
    weights = {"table": TABLE, "tables": draw(2, 16, 4, seed=4), "columns": torch.arange(4)}
    case = Case(function, torch.arange(14).reshape(2, 7), dynamic=False, **weights)
    outcome = case.run(*PASSES)[-1]
    assert outcome.applied == 0
    case.assert_same_numbers()
