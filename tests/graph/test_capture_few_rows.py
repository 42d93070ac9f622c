"""The check of a capture with few rows of every stored weight: what it decodes; it still finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchweld.graph.capture import capture
from torchweld.graph.capture_few_rows import ROWS, FewRows
from torchweld.graph.capture_inputs import flatten_example
from torchweld.graph.capture_verify import PIECE, difference_at, find_differences
from torchweld.graph.formats.legacy_blocks import Int8Blocks
from torchweld.graph.ops.dequantize import dequantize
from torchweld.graph.program import Program

COLUMNS = 64


def stored(rows: int, seed: int = 0) -> Tensor:
    """Random Q8_0 rows with finite scales: uint8 [rows, 68]."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, COLUMNS // 32, 34), dtype=torch.uint8, generator=generator)
    data[..., 1] = data[..., 1] % 16 + 40  # the high byte of the scale: a small normal number
    return data.flatten(-2)


class Table(nn.Module):
    """x [B, S, 64] -> what `read` makes of it and of a stored weight of 200 rows."""

    weight: Tensor

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("weight", stored(200))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, S, 64] -> float32."""
        return self.read(x, dequantize(self.weight, "Q8_0", COLUMNS))


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear with bias": lambda x, weight: F.linear(x, weight, torch.arange(200.0)),
    "matmul": lambda x, weight: x @ weight.t(),
    "concatenated": lambda x, weight: F.linear(x, torch.cat((weight, weight))),
    "cut": lambda x, weight: F.linear(x, weight[100:]),
}


@pytest.fixture
def decoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each decode that really happens."""
    rows: list[int] = []
    decode = Int8Blocks.decode

    def spy(self: Int8Blocks, data: Tensor) -> Tensor:
        rows.append(data.shape[0])
        return decode(self, data)

    monkeypatch.setattr(Int8Blocks, "decode", spy)
    return rows


@pytest.mark.parametrize("read", READS)
def test_the_check_decodes_few_rows_however_a_weight_is_read(read: str, decoded_rows: list[int]) -> None:
    program = capture(Table(READS[read]), (torch.randn(2, 3, COLUMNS),))
    assert decoded_rows
    assert set(decoded_rows) == {ROWS}
    assert {size.low for size in program.sizes} == {1}


@given(st.sampled_from(sorted(READS)), st.integers(1, 4), st.integers(1, 5))
def test_every_way_to_read_sees_one_weight(read: str, batch: int, length: int) -> None:
    model, x = Table(READS[read]), torch.randn(batch, length, COLUMNS)
    with FewRows() as mode, torch.no_grad():
        seen = model(x)
    assert mode.used
    weight = dequantize(model.weight, "Q8_0", COLUMNS)[torch.arange(200) % ROWS]
    torch.testing.assert_close(seen, READS[read](x, weight), rtol=1e-4, atol=1e-4)


def test_small_tables_and_looked_up_rows_are_decoded_as_they_are() -> None:
    small, rows = stored(ROWS), stored(200)
    ids = torch.tensor([[3, 199], [70, 5]])
    with FewRows() as mode:
        assert torch.equal(dequantize(small, "Q8_0", COLUMNS), dequantize(small.clone(), "Q8_0", COLUMNS))
        looked_up = dequantize(F.embedding(ids, rows), "Q8_0", COLUMNS)
    assert not mode.used
    assert torch.equal(looked_up, dequantize(rows, "Q8_0", COLUMNS)[ids])


def _changed(program: Program, target: object, argument: int, value: object) -> Program:
    """A copy in which one argument of the first call of `target` is another."""
    copy = program.copied()
    node = next(node for node in copy.graph_module.graph.nodes if node.target is target)
    node.args = (*node.args[:argument], value, *node.args[argument + 1 :])
    copy.graph_module.recompile()
    return copy


def test_a_graph_that_is_wrong_at_another_size_is_found() -> None:
    model = Table(lambda x, weight: F.linear(x, weight)[:, : x.shape[1] - 1].softmax(-1))
    args = (torch.randn(2, 3, COLUMNS),)
    program = capture(model, args)
    example = flatten_example(model, args, {}, True)
    families = {axis.family for axis in example.axes}
    assert not find_differences(program, model, example, families).culprits
    wrong = _changed(program, torch.ops.aten.slice.Tensor, 3, 2)  # right for three positions only
    culprits = find_differences(wrong, model, example, families).culprits
    assert {family[0] for family in culprits} == {"sequence"}


def test_a_graph_that_mixes_up_the_rows_of_a_weight_is_found() -> None:
    model = Table(lambda x, weight: F.linear(x, weight)[..., 64:128])
    args = (torch.randn(2, 3, COLUMNS),)
    program = capture(model, args)
    example = flatten_example(model, args, {}, True)
    families = {axis.family for axis in example.axes}
    wrong = _changed(program, torch.ops.aten.slice.Tensor, 2, 0)
    wrong = _changed(wrong, torch.ops.aten.slice.Tensor, 3, 64)
    assert find_differences(wrong, model, example, families).culprits


def test_a_difference_counts_only_with_the_true_weights(decoded_rows: list[int]) -> None:
    class Hidden(Table):
        """A decode that a mode for torch functions does not see in the model, but sees in the graph."""

        def forward(self, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                weight = dequantize(self.weight, "Q8_0", COLUMNS)
            return F.linear(x, weight)

    program = capture(Hidden(F.linear), (torch.randn(2, 3, COLUMNS),))
    assert {200, ROWS} == set(decoded_rows)
    assert not program.static_dims
    assert {size.low for size in program.sizes} == {1}


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, PIECE + 5])
@pytest.mark.parametrize("value", [1.5, torch.nan])
def test_one_wrong_element_of_a_large_output_is_found(place: int, value: float) -> None:
    def model(x: Tensor) -> Tensor:
        return x.expand(PIECE + 6) * 1.0

    def planted(x: Tensor) -> Tensor:
        return torch.cat((model(x)[:place], torch.full((1,), value), model(x)[place + 1 :]))

    args = (torch.ones(1),)
    example = flatten_example(model, args, {}, False)
    right, wrong = (capture(function, args, dynamic=False, verify=False) for function in (model, planted))
    assert difference_at(right, model, example, {}) is None
    assert "differs" in (difference_at(wrong, model, example, {}) or "")
