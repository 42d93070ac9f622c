"""Capture: what is kept, what is fixed, what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchweld.graph.capture import capture, from_exported, load_pt2
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.capture_inputs import flatten_example
from torchweld.graph.capture_verify import find_differences
from torchweld.graph.edit import writes
from torchweld.graph.program import Program, source_line

aten = torch.ops.aten


class Block(nn.Module):
    """Every composite that must survive, tied weights, dropout, a buffer and a cast that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm, self.rms = nn.LayerNorm(16), nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, object]:
        x = self.drop(self.norm(self.embed(ids))).to(torch.float32)
        heads = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + self.down(F.silu(self.up(self.rms(x))) + F.gelu(self.up(x))) * self.scale
        return {"logits": torch.softmax(self.head(x), -1), "length": ids.shape[1], "cache": None}


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture(scope="module")
def program(block: Block) -> Program:
    return capture(block, (torch.randint(0, 32, (1, 6)),))


def targets(program: Program) -> set[object]:
    return {node.target for node in program.graph.nodes}


def test_composites_are_kept_and_the_rest_is_gone(program: Program) -> None:
    kept = {
        aten.linear.default,
        aten.scaled_dot_product_attention.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.softmax.int,
        aten.gelu.default,
        aten.silu.default,
        aten.embedding.default,
    }
    assert kept <= targets(program)
    gone = ("dropout", "_assert", "aten.to.")
    assert not [t for t in targets(program) if any(word in str(t) for word in gone)]
    assert not any(writes(node) for node in program.graph.nodes)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (4, 1), (3, 17)])
def test_one_program_serves_every_size(block: Block, program: Program, batch: int, length: int) -> None:
    ids = torch.randint(0, 32, (batch, length))
    expected, actual = block.eval()(ids), program.run(ids)
    assert isinstance(actual, dict) and actual["length"] == length and actual["cache"] is None
    torch.testing.assert_close(actual["logits"], expected["logits"])
    assert {(s.dim, s.low, s.high) for s in program.sizes} == {(0, 1, None), (1, 1, None)}


def test_every_node_knows_value_and_source(program: Program) -> None:
    for node in program.graph.nodes:
        assert node.op == "output" or "val" in node.meta, node
    linear = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    assert source_line(linear).startswith("test_capture.py:")
    assert "self.rms(x)" in source_line(linear)
    assert source_line(fx_node_without_trace()) == "<no source>"


def fx_node_without_trace() -> torch.fx.Node:
    return torch.fx.Graph().placeholder("x")


def test_names_ties_and_memory_are_those_of_the_model(block: Block, program: Program) -> None:
    stored = dict(program.graph_module.named_parameters(remove_duplicate=False))
    assert set(stored) <= set(block.state_dict())
    assert stored["embed.weight"] is stored.get("head.weight", stored["embed.weight"])
    assert stored["embed.weight"].data_ptr() == block.embed.weight.data_ptr()
    assert not any(p.requires_grad for p in stored.values())
    assert dict(program.graph_module.named_buffers())["scale"] == 2


def test_training_mode_is_restored(block: Block) -> None:
    block.train()
    capture(block, (torch.randint(0, 32, (2, 3)),))
    assert block.training and block.drop.training


def test_arguments_by_name_and_wrong_ones(program: Program) -> None:
    ids = torch.randint(0, 32, (2, 4))
    assert torch.equal(program.run(ids=ids)["logits"], program.run(ids)["logits"])  # type: ignore[index]
    with pytest.raises(TypeError, match="'mask' was not part of the capture; expected ids"):
        program.run(ids, mask=None)
    with pytest.raises(TypeError, match="missing argument 'ids'"):
        program.run()
    with pytest.raises(ValueError, match=r"input 'ids' is torch\.float32"):
        program.check_inputs([ids.float()])
    with pytest.raises(ValueError, match=r"input 'ids' has shape \(8,\)"):
        program.check_inputs([ids.flatten()])


def test_in_place_code_on_own_values_becomes_functional() -> None:
    def paint(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 0] = 1
        return y.relu_()

    captured = capture(paint, (torch.randn(2, 3),))
    x = torch.randn(5, 3)
    assert torch.equal(captured.run(x), paint(x))  # type: ignore[arg-type]
    assert not any(writes(node) for node in captured.graph.nodes)


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x + 1
    return x - 1


def overwrite(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1)


def mismatch(x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, x)


def strange(x: torch.Tensor) -> object:
    return x, object()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (branch, r"test_capture.py:\d+: if x.sum\(\) > 0:: control flow or a size depends on the values"),
        (overwrite, r"test_capture.py:\d+: return x.add_\(1\): the forward writes to 'x'"),
        (mismatch, r"test_capture.py:\d+: return torch.mm\(x, x\): the model itself fails on the example"),
        (strange, r"the model returns a object"),
    ],
)
def test_refusals_name_the_line(function: object, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        capture(function, (torch.randn(4, 3),))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_empty_and_missing_examples_are_refused() -> None:
    with pytest.raises(CaptureError, match="'x' is empty"):
        capture(branch, (torch.randn(0, 3),))
    with pytest.raises(CaptureError, match="no example input is a tensor"):
        capture(branch, (3,))
    with pytest.raises(CaptureError, match="dynamic names 'y'"):
        capture(branch, (torch.randn(2, 3),), dynamic={"y": [0]})


class Table(nn.Module):
    """Adds a table of exactly eight positions: the length cannot vary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def test_a_dimension_that_the_model_fixes_is_noted() -> None:
    captured = capture(Table(), (torch.randn(2, 8, 4),))
    assert [(d.input, d.dim, d.size) for d in captured.static_dims] == [("x", 1, 8)]
    assert [(s.dim, s.low) for s in captured.sizes] == [(0, 1)]
    with pytest.raises(ValueError, match="has shape"):
        captured.check_inputs([torch.randn(2, 7, 4)])


def test_dynamic_can_be_chosen() -> None:
    none = capture(overwrite_free, (torch.randn(2, 5, 4),), dynamic=False)
    assert not none.sizes and none.placeholders[0].meta["val"].shape == (2, 5, 4)
    one = capture(overwrite_free, (torch.randn(2, 5, 4),), dynamic={"x": [2]})
    assert [(s.input, s.dim) for s in one.sizes] == [("x", 2)]


def overwrite_free(x: torch.Tensor) -> torch.Tensor:
    return x.exp().sum(-1)


def test_verification_sees_a_wrong_program() -> None:
    """The check of a capture must be able to fail: plant a program that is right at one length only."""
    model = Table()
    x = torch.randn(2, 8, 4)
    wrong = capture(lambda x: x + model.table[: x.shape[1]] * (x.shape[0] / 2), (x,), verify=False)
    example = flatten_example(model, (x,), {}, {"x": [0]})
    report = find_differences(wrong, model, example, {axis.family for axis in example.axes})
    assert not report.works_at_one
    right = capture(model, (x,), verify=False)
    assert not find_differences(right, model, example, {axis.family for axis in example.axes}).culprits
    off = capture(lambda x: x + model.table * x.shape[0], (x,), verify=False)
    assert find_differences(off, model, example, {axis.family for axis in example.axes}).culprits


def test_pytree_inputs_and_constants() -> None:
    def mix(pair: dict[str, torch.Tensor], *, power: int, flip: bool) -> tuple[torch.Tensor, ...]:
        value = pair["a"] ** power + pair["b"]
        return (value, -value) if flip else (value,)

    pair = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    captured = capture(mix, (pair,), {"power": 3, "flip": True})
    other = {"a": torch.randn(5, 3), "b": torch.randn(5, 3)}
    torch.testing.assert_close(captured.run(other, power=3, flip=True), mix(other, power=3, flip=True))
    with pytest.raises(ValueError, match="'power' is 2; captured for 3"):
        captured.check_inputs([other["a"], other["b"], 2, True])
    with pytest.raises(ValueError, match="dimension 0 must have size 5"):
        captured.check_inputs([other["a"], other["b"][:2], 3, True])


def test_exported_programs_and_files(tmp_path: Path, block: Block) -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    ids = torch.randint(0, 32, (3, 6))
    exported = torch.export.export(
        block.eval(), (ids,), dynamic_shapes={"ids": {0: batch, 1: length}}, strict=False
    )
    path = tmp_path / "block.pt2"
    torch.export.save(exported, path)
    other = torch.randint(0, 32, (2, 9))
    for captured in (from_exported(exported), load_pt2(path)):
        result = captured.run(other)
        assert isinstance(result, dict)
        torch.testing.assert_close(result["logits"], block(other)["logits"])
        stored = set(dict(captured.graph_module.named_parameters()))
        assert stored < set(block.state_dict()) and stored & {"embed.weight", "head.weight"}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x00" * 64])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match="cannot be read") as caught:
        load_pt2(path)
    assert "\n" not in str(caught.value)


def test_copied_shares_tensors_but_not_the_graph(program: Program) -> None:
    copy = program.copied()
    next(n for n in copy.graph.nodes if n.target is aten.silu.default).target = aten.relu.default
    assert aten.silu.default in targets(program)
    assert copy.fake_inputs[0] is program.fake_inputs[0]
    first = dict(copy.graph_module.named_parameters())["embed.weight"]
    assert first is dict(program.graph_module.named_parameters())["embed.weight"]
