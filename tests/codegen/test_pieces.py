"""Where the elements of a result come from: pieces of concatenations, and the way from an anchor to a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sympy import Integer
from torch import Tensor, fx
from torch.nn import functional as F

from tests.passes.fusion_cases import numbers, whole
from tests.passes.support import Case
from torchweld.codegen.pieces import MAX_PIECES, anchor_path, carry_forward, pieces_of
from torchweld.graph.index import Ranges
from torchweld.graph.meaning.context import Unsupported
from torchweld.graph.terms import Axis


def graph_of(
    function: Callable[..., Any], *inputs: Tensor, **weights: Tensor
) -> tuple[frozenset[fx.Node], fx.Node]:
    """What is inside the function's one group, and its result."""
    case = Case(function, *inputs, dynamic=False, **weights)
    (result,) = case.graph_module.graph.output_node().all_input_nodes
    return frozenset(whole(case).inside), result


def places(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    """The tensor of every piece, and where its element (1, 2) lands."""
    inside, result = graph_of(function, *inputs)
    at = Integer(1), Integer(2)
    return [(piece.node.name, tuple(map(int, piece.place(at)))) for piece in pieces_of(result, inside)]


def test_one_piece_without_a_concatenation() -> None:
    inside, result = graph_of(lambda m, x: x.exp(), numbers(3, 4))
    (piece,) = pieces_of(result, inside)
    assert (piece.output, piece.node, piece.place((Integer(1), Integer(2)))) == (result, result, (1, 2))


def test_pieces_of_a_concatenation_stand_behind_each_other() -> None:
    found = places(lambda m, x, y: torch.cat([x.exp(), y, x.neg()], 1), numbers(3, 4), numbers(3, 5))
    assert found == [("exp", (1, 2)), ("inputs_1", (1, 6)), ("neg", (1, 11))]


def test_a_negative_dimension_counts_from_the_end() -> None:
    assert places(lambda m, x: torch.cat([x, x], -2), numbers(3, 4)) == [
        ("inputs_0", (1, 2)),
        ("inputs_0", (4, 2)),
    ]


@pytest.mark.parametrize(("dim", "second"), [(0, (1, 1, 2)), (1, (1, 1, 2)), (2, (1, 2, 1)), (-1, (1, 2, 1))])
def test_pieces_of_a_stack_have_a_place_in_a_new_dimension(dim: int, second: tuple[int, ...]) -> None:
    found = places(lambda m, x, y: torch.stack([x, y], dim), numbers(3, 4), numbers(3, 4))
    assert found[1] == ("inputs_1", second)
    assert found[0][1] == (*second[: dim % 3], 0, *second[dim % 3 + 1 :])


def test_an_empty_vector_is_no_piece() -> None:
    """torch lets it stand in any concatenation."""
    inside, result = graph_of(lambda m, x: torch.cat([m.e, x, x], 0), numbers(3, 4), e=numbers(0))
    found = pieces_of(result, inside)
    assert [piece.place((Integer(1), Integer(2))) for piece in found] == [(1, 2), (4, 2)]


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_a_long_concatenation_is_one_piece(join: Callable[..., Tensor]) -> None:
    for count, pieces in ((MAX_PIECES, MAX_PIECES), (MAX_PIECES + 1, 1)):
        inside, result = graph_of(lambda m, x, n=count: join([x] * n), numbers(3, 4))
        assert len(pieces_of(result, inside)) == pieces


# -- from the anchor to the store -----------------------------------------------------------------------------


def test_the_path_runs_from_the_anchor_through_pointwise_work_and_views() -> None:
    inside, result = graph_of(
        lambda m, x, y: y + F.linear(x, m.w).relu().transpose(0, 1),
        numbers(3, 8),
        numbers(6, 3),
        w=numbers(6, 8),
    )
    names = [node.name.rstrip("_0123456789") for node in anchor_path(result, inside)]
    assert names == ["linear", "relu", "transpose", "add"]


def test_no_path_without_an_anchor_or_through_a_reduction() -> None:
    inside, result = graph_of(lambda m, x: x.exp() + 1, numbers(3, 8))
    assert anchor_path(result, inside) == []
    inside, result = graph_of(lambda m, x: F.softmax(F.linear(x, m.w), -1), numbers(3, 8), w=numbers(6, 8))
    assert anchor_path(result, inside) == []


def test_no_path_to_an_anchor_outside() -> None:
    _, result = graph_of(lambda m, x: F.linear(x, m.w).relu(), numbers(3, 8), w=numbers(6, 8))
    assert anchor_path(result, {result}) == []


def carried(
    function: Callable[..., Any], *inputs: Tensor, **weights: Tensor
) -> Callable[[int, int], tuple[int, ...]]:
    """Where the element (i, j) of the anchor stands in the result."""
    inside, result = graph_of(function, *inputs, **weights)
    path = anchor_path(result, inside)
    rows, columns = path[0].meta["val"].shape
    axes = Axis("i", Integer(rows)), Axis("j", Integer(columns))
    ranges = Ranges()
    ranges.declare(axes)
    index = carry_forward(path, (axes[0].symbol, axes[1].symbol), ranges)
    return lambda i, j: tuple(int(e.subs({axes[0].symbol: i, axes[1].symbol: j})) for e in index)


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.relu(),
        lambda y: y.T + 1,
        lambda y: y.view(4, 2, 3).transpose(0, 1),
        lambda y: y.view(2, 2, 6).permute(2, 0, 1).reshape(6, 4),
        lambda y: y.reshape(3, 8),
        lambda y: y.flatten().unsqueeze(0),
        lambda y: y.unsqueeze(1).squeeze(1),
        lambda y: y + torch.zeros(1, 1, 1, device=y.device),
        lambda y: y.transpose(0, 1).contiguous() * 2,
    ],
    ids=["pointwise", "transposed", "heads", "permuted", "cut", "flat", "ones", "broadcast", "copied"],
)
def test_every_element_is_carried_to_where_torch_puts_it(after: Callable[[Tensor], Tensor]) -> None:
    """All elements differ; the carried index must find the one that torch moves there."""

    def moves(m: Any, x: Tensor) -> Tensor:
        return after(F.linear(x, m.w)) * 2

    find = carried(moves, numbers(4, 8), w=numbers(6, 8))
    positions = after((torch.arange(24.0) + 1).reshape(4, 6))
    order = sorted({float(value) for value in positions.flatten()})
    assert len(order) == 24
    for i in range(4):
        for j in range(6):
            assert float(positions[find(i, j)]) == order[i * 6 + j]


@pytest.mark.parametrize(
    ("after", "name"),
    [
        (lambda y: y[:, :3].relu(), "slice_1"),
        (lambda y: y[1].relu(), "select"),
        (lambda y: y.unsqueeze(1).expand(4, 5, 6).relu(), "expand"),
        (lambda y: F.pad(y, (1, 0)), "pad"),
        (lambda y: y.repeat(2, 1), "repeat"),
        (lambda y: y.view(4, 1, 6) * torch.ones(1, 5, 1, device=y.device), "mul"),
    ],
)
def test_what_drops_or_repeats_elements_is_refused(after: Callable[[Tensor], Tensor], name: str) -> None:
    inside, result = graph_of(lambda m, x: after(F.linear(x, m.w)), numbers(4, 8), w=numbers(6, 8))
    path = anchor_path(result, inside)
    axes = Axis("i", Integer(4)), Axis("j", Integer(6))
    ranges = Ranges()
    ranges.declare(axes)
    with pytest.raises(
        Unsupported, match=rf"^{name}(_\w+)?: the result of linear is read at other places than it is made$"
    ):
        carry_forward(path, (axes[0].symbol, axes[1].symbol), ranges)


@pytest.mark.parametrize("other", [(5, 4, 1), (1, 4, 6), (5, 4, 6)])
def test_a_result_that_is_repeated_by_a_larger_operand_is_refused(other: tuple[int, ...]) -> None:
    """More dimensions in front are only carried where all of them are 1 and the rest is as it was."""
    inside, result = graph_of(
        lambda m, x, y: F.linear(x, m.w) + y, numbers(4, 8), numbers(*other), w=numbers(1, 8)
    )
    path = anchor_path(result, inside)
    with pytest.raises(Unsupported, match="read at other places than it is made"):
        carry_forward(path, (Integer(0), Integer(0)), Ranges())
