"""canonicalize_slices: parts along an axis."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.passes.support import Case, aten, draw, reasons
from torchweld.graph.match import MAX_INDEX
from torchweld.graph.rewrite import run_pass
from torchweld.passes import canonicalize_identities, canonicalize_slices


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: sum(part * (place + 1) for place, part in enumerate(x.split(3, -1))),
        lambda m, x: sum(part * (place + 1) for place, part in enumerate(x.split([3, 3], 2))),
        lambda m, x: x.chunk(2, -1)[1],
        lambda m, x: sum(part.sum() * (place + 1) for place, part in enumerate(x.tensor_split(4, -1))),
        lambda m, x: sum(part.sum() * (place + 1) for place, part in enumerate(x.tensor_split([1, 4], -1))),
        lambda m, x: sum(part * (place + 1) for place, part in enumerate(x.unbind(-1))),
        lambda m, x: x.narrow(-1, 2, 3),
        lambda m, x: x[..., -2:],
        lambda m, x: x[..., :-2],
        lambda m, x: x[:, :, [2, 3, 4]],
        lambda m, x: x[:, :, [-2, -1]],
    ],
)
def test_parts_are_slices(function: Callable[..., Any]) -> None:
    case = Case(function, draw(3, 5, 6))
    outcome, _ = case.run(canonicalize_slices, canonicalize_identities)
    assert outcome.applied >= 1 and not outcome.refused
    left = {target.split(".")[1] for target in case.node_targets() if target.startswith("aten")}
    assert left <= {"slice", "select", "mul", "add", "sum", "sym_size"}
    for node in case.graph_module.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        axis, start, end = node.args[1:4]
        assert axis == 2 and start >= 0 and (end == MAX_INDEX or 0 < end < 6)
    case.assert_same_numbers()
    case.assert_same_numbers(draw(2, 4, 6, seed=2))


def test_a_slice_to_the_end_of_a_symbolic_axis_stays() -> None:
    case = Case(lambda m, x: x[:, 1:], draw(3, 5, 6))
    case.run(canonicalize_slices, canonicalize_identities)
    assert case.only(aten.slice.Tensor).args[1:] == (1, 1, MAX_INDEX)
    case.assert_same_numbers(draw(3, 9, 6))


def test_a_negative_start_in_a_symbolic_axis_stays() -> None:
    case = Case(lambda m, x: x[:, -2:], draw(3, 5, 6))
    case.run(canonicalize_slices, canonicalize_identities)
    assert case.only(aten.slice.Tensor).args[2] == -2
    case.assert_same_numbers(draw(3, 9, 6))


def test_refuses_pieces_whose_size_is_not_fixed() -> None:
    case = Case(lambda m, x: x.chunk(2, 1)[1], draw(3, 6, 4))
    (outcome,) = case.run(canonicalize_slices)
    assert reasons(outcome) == ["a piece has no fixed size"]
    case.assert_same_numbers(draw(3, 8, 4))


def test_refuses_pieces_used_as_a_tuple() -> None:
    case = Case(lambda m, x: x.split(3, -1)[0], draw(3, 5, 6))
    split = case.only(aten.split.Tensor)
    with case.graph_module.graph.inserting_after(split):
        whole = case.graph_module.graph.call_function(len, (split,))
    output = case.graph_module.graph.output_node()
    output.args = ((*output.args[0], whole),)  # type: ignore[misc]
    outcome = run_pass(case.graph_module, canonicalize_slices)
    assert reasons(outcome) == ["the pieces are used as a tuple"]


def test_refuses_scattered_indices() -> None:
    case = Case(lambda m, x: x[:, :, m.rows], draw(3, 5, 6), rows=torch.tensor([0, 2, 1]))
    (outcome,) = case.run(canonicalize_slices)
    assert reasons(outcome) == ["constant indices are not contiguous"]
    case.assert_same_numbers()


def test_refuses_indices_into_a_symbolic_axis() -> None:
    case = Case(lambda m, x: x[:, m.rows], draw(3, 5, 6), rows=torch.tensor([-2, -1]))
    (outcome,) = case.run(canonicalize_slices)
    assert reasons(outcome) == ["indices into an axis whose size is not fixed"]
    case.assert_same_numbers(draw(3, 7, 6))


def test_refuses_a_narrow_at_a_size() -> None:
    case = Case(lambda m, x, y: x.narrow(1, 0, 2), draw(3, 5, 6), draw(3, 4))
    run_pass(case.graph_module, canonicalize_identities)
    narrow = _as_narrow(case)
    outcome = run_pass(case.graph_module, canonicalize_slices)
    assert reasons(outcome) == ["start or length of narrow is not fixed"]
    assert outcome.refused[0].node is narrow


def _as_narrow(case: Case) -> fx.Node:
    """Spelled by hand, with a size for its length."""
    (node,) = (node for node in case.graph_module.graph.nodes if node.op == "call_function")
    source, other = case.program.placeholders
    with case.graph_module.graph.inserting_before(node):
        size = case.graph_module.graph.call_function(aten.sym_size.int, (other, 1))
    size.meta["val"] = other.meta["val"].shape[1]
    node.target, node.args = aten.narrow.default, (source, 1, 0, size)
    return node


def test_a_mask_is_no_list_of_indices() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return x[:, :, m.rows]

    case = Case(function, draw(3, 5, 2), rows=torch.tensor([True, True]), dynamic=False)
    outcome = run_pass(case.graph_module, canonicalize_slices)
    assert outcome.applied == 0
    case.assert_same_numbers()
