"""Torch's scans in a captured program: equal to the model at every length, and refused where they cannot be held."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, scan

from torchweld.graph.capture import TRACED_SIZES, capture, from_exported
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.capture_scan import keep_scans
from torchweld.graph.match import shape_of
from torchweld.graph.ops.scan import Scan
from torchweld.graph.program import Program

WIDTH = 5
Mix = Callable[[nn.Module, Tensor], Tensor]


class Mixer(nn.Module):
    """`mix(module, x)` of vectors [B, S, WIDTH]; modules know a linear and a buffer."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.again = mix, nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Buffer(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, x)


def captured(mix: Mix) -> tuple[Program, Mixer]:
    model = Mixer(mix).eval()
    return capture(model, (torch.randn(2, 7, WIDTH),), {}, verify=False), model


def scans(program: Program) -> list[Scan]:
    return [node.target for node in program.graph.nodes if isinstance(node.target, Scan)]


def elman(m: Any, x: Tensor) -> Tensor:
    """A nonlinear recurrence over weights that the body closes over, and a constant that it makes."""

    def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(m.again(h) + row) * torch.tensor(0.9)
        return h, h * 2

    return scan(step, torch.zeros(x.shape[0], WIDTH), x, dim=1)[1]  # type: ignore[no-any-return]


def elman_as_a_loop(m: Any, x: Tensor) -> Tensor:
    h, results = torch.zeros(x.shape[0], WIDTH), []
    for row in x.unbind(1):
        h = torch.tanh(m.again(h) + row) * 0.9
        results.append(h * 2)
    return torch.stack(results, 1)


def counted(m: Any, x: Tensor) -> Tensor:
    """Two carries of different dtypes in a dictionary; of both the last value is read."""

    def step(carry: dict[str, Tensor], row: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        count = carry["count"] + 1
        total = carry["total"] * m.decay + row
        return {"total": total, "count": count}, total / count

    first = {"total": torch.zeros(x.shape[0], WIDTH), "count": torch.zeros(x.shape[0], 1, dtype=torch.int64)}
    last, means = scan(step, first, x, dim=1)
    return means + last["total"][:, None] / last["count"][:, None]  # type: ignore[no-any-return]


def counted_as_a_loop(m: Any, x: Tensor) -> Tensor:
    total, results = torch.zeros(x.shape[0], WIDTH), []
    for place, row in enumerate(x.unbind(1)):
        total = total * m.decay + row
        results.append(total / (place + 1))
    return torch.stack(results, 1) + total[:, None] / x.shape[1]


def linear(m: Any, x: Tensor) -> Tensor:
    """h[t] = a[t] h[t - 1] + x[t] as an associative scan of pairs."""
    pairs = torch.sigmoid(m.again(x)), x
    _, found = associative_scan(
        lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1]), pairs, dim=1,
        combine_mode="generic",
    )  # fmt: skip
    return found  # type: ignore[no-any-return]


def linear_as_a_loop(m: Any, x: Tensor) -> Tensor:
    gates, results = torch.sigmoid(m.again(x)), [x[:, 0]]
    for place in range(1, x.shape[1]):
        results.append(gates[:, place] * results[-1] + x[:, place])
    return torch.stack(results, 1)


def log_sum(m: Any, x: Tensor) -> Tensor:
    """One tensor instead of a tuple of them."""
    return associative_scan(torch.logaddexp, x, dim=1, combine_mode="generic")  # type: ignore[no-any-return]


CASES: dict[str, tuple[Mix, Mix]] = {
    "elman": (elman, elman_as_a_loop),
    "counted": (counted, counted_as_a_loop),
    "linear": (linear, linear_as_a_loop),
    "log sum": (log_sum, lambda m, x: x.logcumsumexp(1)),
    "from the end": (
        lambda m, x: scan(lambda h, row: (h + row, h * 2), x[:, 0] * 0, x, dim=1, reverse=True)[1],
        lambda m, x: 2 * (x.flip(1).cumsum(1) - x.flip(1)).flip(1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_call_equals_the_loop_at_every_length(name: str) -> None:
    mix, loop = CASES[name]
    program, model = captured(mix)
    assert len(scans(program)) == 1
    assert not program.static_dims
    for batch, length in ((3, 1), (1, 2), (2, 6), (2, 17)):
        x = torch.randn(batch, length, WIDTH)
        with torch.no_grad():
            torch.testing.assert_close(program.run(x), loop(model, x), rtol=1e-5, atol=1e-6)


def test_the_model_itself_is_what_a_capture_is_compared_with() -> None:
    """torch runs its own scans here: a tree of pairs for one, its operator for the other."""

    def both(m: Any, x: Tensor) -> Tensor:
        return elman(m, linear(m, x))

    program = capture(Mixer(both).eval(), (torch.randn(2, 7, WIDTH),))
    assert len(scans(program)) == 2
    assert {(size.dim, size.low, size.high) for size in program.sizes} == {(0, 1, None), (1, 1, None)}


def test_only_what_is_read_is_a_result() -> None:
    (found,) = scans(captured(counted)[0])
    assert (found.carries, found.states) == (2, (0, 1))
    (found,) = scans(captured(elman)[0])
    assert (found.carries, found.states) == (1, ())


def test_the_source_line_is_the_users() -> None:
    program, _ = captured(elman)
    (node,) = (node for node in program.graph.nodes if isinstance(node.target, Scan))
    assert "return scan(step, torch.zeros" in node.meta["stack_trace"]
    assert str(node.target) == "torchweld.scan"


def test_constants_of_a_body_become_inputs_of_the_call() -> None:
    program, _ = captured(elman)
    (node,) = (node for node in program.graph.nodes if isinstance(node.target, Scan))
    names = [shared.target for shared in node.args[2]]
    assert names[:2] == ["again.weight", "again.bias"] and len(names) == 3
    assert not list(scans(program)[0].body.graph.find_nodes(op="get_attr"))  # type: ignore[attr-defined]


def test_the_graph_can_be_copied_and_printed() -> None:
    program, model = captured(counted)
    x = torch.randn(2, 4, WIDTH)
    copy = program.copied()
    copy.graph_module.recompile()
    with torch.no_grad():
        torch.testing.assert_close(copy.run(x), counted_as_a_loop(model, x))
    assert "scan" in copy.graph_module.code


def test_torch_itself_has_no_pointwise_mode_on_a_cpu() -> None:
    """The reason is torch's: should this one day not raise, the mode can be captured too."""
    mix: Mix = lambda m, x: associative_scan(torch.add, x, dim=1)  # noqa: E731
    with pytest.raises(CaptureError, match="combine_mode='pointwise', all input tensors need to be on CUDA"):
        captured(mix)


def test_an_exported_program_that_torch_unrolled_is_refused() -> None:
    x = torch.randn(7, 29, WIDTH)
    with torch.no_grad():
        exported = torch.export.export(Mixer(log_sum).eval(), (x,), strict=False)
    with pytest.raises(CaptureError, match=r"associative_scan that torch\.export unrolled for one length"):
        from_exported(exported)


def test_control_flow_inside_a_scan_is_refused() -> None:
    def branching(m: Any, x: Tensor) -> Tensor:
        def step(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.cond(row.sum() > 0, lambda a, b: a + b, lambda a, b: a - b, (h, row))
            return h, h * 2

        return scan(step, torch.zeros(x.shape[0], WIDTH), x, dim=1)[1]  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match=r"in the body of a scan.*put no scan inside a scan") as caught:
        captured(branching)
    assert "test_capture_scan.py" in caught.value.place


def test_what_was_captured_before_fixes_no_size() -> None:
    """Dynamo keeps what it made for a model of a fixed batch, and asks the next one whether its batch is that."""

    def fixed(m: Any, x: Tensor) -> Tensor:
        return scan(lambda h, row: (h + row, h * 2), torch.zeros(len(x), WIDTH), x, dim=1)[1]  # type: ignore[no-any-return]

    def free(m: Any, x: Tensor) -> Tensor:
        return scan(lambda h, row: (h * row, h * 2), torch.zeros(x.shape[0], WIDTH), x, dim=1)[1]  # type: ignore[no-any-return]

    def fixed_sizes(mix: Mix) -> list[int]:
        (x,) = captured(mix)[0].placeholders
        return [dim for dim in shape_of(x) if isinstance(dim, int)]

    assert fixed_sizes(fixed) == [TRACED_SIZES["batch"], WIDTH]
    assert fixed_sizes(free) == [WIDTH]


def test_torch_is_left_as_it_was() -> None:
    modules = [
        importlib.import_module(f"torch._higher_order_ops.{name}") for name in ("scan", "associative_scan")
    ]
    before = [dict(vars(module)) for module in modules]
    with pytest.raises(ZeroDivisionError), keep_scans():
        assert [dict(vars(module)) for module in modules] != before
        raise ZeroDivisionError
    assert [dict(vars(module)) for module in modules] == before
