"""position_rules: positions that are counted, and dtypes that cannot count them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from tests.passes.support import Case
from torchweld.graph.match import shape_of
from torchweld.graph.position_rules import make_prover
from torchweld.graph.positions import BATCH, QUERY, Extents, Unprovable
from torchweld.passes import CANONICALIZE

Positions = Callable[[Any, Tensor], Tensor]


def line_of(function: Positions) -> Any:
    """The value of function(m, ids int64 [B, S]) at [b, t], as an expression of t; Unprovable if none is known."""
    tables = {"zeros": torch.zeros(1, 32, dtype=torch.int64), "places": torch.arange(32) + 5}
    case = Case(function, torch.arange(14).reshape(2, 7), **tables)
    case.run(*CANONICALIZE)
    batch, length = shape_of(case.program.placeholders[0])
    prover = make_prover(case.graph_module, Extents(batch, sympy.Integer(1), length, length))
    (result,) = case.program.outputs
    assert isinstance(result, torch.fx.Node)
    return prover.value(result, (BATCH, QUERY) if len(shape_of(result)) == 2 else (QUERY,))


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda m, ids: torch.arange(ids.shape[1]), QUERY),
        (lambda m, ids: torch.ones_like(ids).cumsum(1) - 1, QUERY),
        # OPT counts ones without an integer dtype, and multiplies by them.
        (lambda m, ids: torch.ones(ids.shape).cumsum(1), QUERY + 1),
        (lambda m, ids: (torch.ones(ids.shape).cumsum(1) * torch.ones(ids.shape) - 1).long() + 2, QUERY + 2),
        (lambda m, ids: torch.arange(ids.shape[1]) * torch.full((1,), 2.0), 2 * QUERY),
        (lambda m, ids: torch.arange(ids.shape[1]).float() + 3.0, QUERY + 3),
        # BERT gathers token types, all zero, by position.
        (
            lambda m, ids: torch.gather(
                m.zeros.expand(ids.shape[0], -1), 1, torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1)
            ),
            0,
        ),
        (lambda m, ids: torch.gather(m.places[None], 1, torch.arange(ids.shape[1])[None] * 2), 2 * QUERY + 5),
    ],
)
def test_counted_positions_are_lines(function: Positions, line: Any) -> None:
    assert sympy.expand(line_of(function) - line) == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, ids: torch.ones(ids.shape, dtype=torch.bfloat16).cumsum(1), "rounds positions"),
        (lambda m, ids: torch.arange(ids.shape[1]) + torch.ones(1, dtype=torch.bfloat16), "rounds positions"),
        (lambda m, ids: torch.arange(ids.shape[1]).to(torch.int8) * 2, "rounds positions"),
        (lambda m, ids: torch.arange(ids.shape[1]) * torch.full((1,), 0.5), "which no distance decides"),
        (lambda m, ids: (ids > 0).cumsum(1), "it depends on"),
        (lambda m, ids: torch.gather(m.places[None].expand(2, -1), 1, ids), "it depends on input"),
    ],
)
def test_what_is_no_line(function: Positions, reason: str) -> None:
    with pytest.raises(Unprovable, match=reason):
        line_of(function)
