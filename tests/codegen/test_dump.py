"""Dumped kernels check themselves, and the check goes red when the kernel is wrong."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import fx

from tests import kernels_by_hand as by_hand
from torchweld.codegen.dump import CheckResult, KernelDump, check_files, dump_all, dump_kernel
from torchweld.codegen.dump_text import check_sizes_of
from torchweld.codegen.reference import decode_source, plain_source, reference_source
from torchweld.graph.formats import FORMATS, get_format
from torchweld.graph.ops.attention import attention_reference, positional_visibility
from torchweld.graph.target import SM_90

SIZES = {"B": 1, "S": 128}

REFERENCES = {
    "rms_norm": """
def reference(x, w, B, S):
    return torch.nn.functional.rms_norm(x, w.shape, w, 1e-6), x + x
""",
    "softmax_argmax": """
def reference(x, z, B, S):
    return x.softmax(-1), z.argmax(-1)
""",
    "gather_concat": """
def reference(ids, table, x, B):
    return torch.cat([table[ids], -x], -1),
""",
    "norm_gated_linear_q8_0": decode_source("Q8_0")
    + """

def reference(x, w, gate, up, r, B, S):
    n = torch.nn.functional.rms_norm(x, w.shape, w, 1e-6)
    gate, up = (decode_q8_0(t, "Q8_0", 64) for t in (gate, up))
    return torch.nn.functional.silu(n @ gate.T) * (n @ up.T) + r,
""",
    "attention_causal": "\n\n".join([plain_source(positional_visibility), plain_source(attention_reference)])
    + """

def reference(q, k, v, B, S):
    q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k, v))
    return attention_reference(q, k, v, None, "causal", 0, 0.25, 0.0).transpose(1, 2).flatten(2),
""",
}

FAULTS = {
    "one_lane": ("rms_norm", "tl.rsqrt((", "tl.where(row == 3, 1.01, 1.0) * tl.rsqrt(("),
    "scaled": ("rms_norm", "x + x", "(x + x) * 1.0005"),
    "mask_dropped": ("softmax_argmax", ", 0.0), axis=1", ", 1.0), axis=1"),
    "wrong_index": ("softmax_argmax", "2147483647)", "2147483647) + 1"),
    "not_written": ("gather_concat", "mask=(row < B) & (d < 10)", "mask=(row < B) & (d < 9)"),
    "wrong_block": ("norm_gated_linear_q8_0", "place = k_down % 32", "place = (k_down + 1) % 32"),
    "causal_off_by_one": ("attention_causal", "s_across <= t", "s_across < t"),
    "nan": ("rms_norm", "x + x", 'tl.where(row == 1, float("nan"), x + x)'),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels with a reference here, dumped without building them."""
    folder = tmp_path_factory.mktemp("dump")
    for name, reference in REFERENCES.items():
        dump_kernel(by_hand.ALL[name](), reference, folder / name, [], "// C++\n", SIZES)
    return folder


def dumped(folder: Path, name: str) -> Path:
    return next((folder / name).glob("*.py"))


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, CheckResult]:
    """The self-checks of the sound files and of those with a planted fault, all in two processes."""
    files = {name: dumped(folder, name) for name in REFERENCES}
    for fault, (name, old, new) in FAULTS.items():
        text = files[name].read_text(encoding="utf-8")
        head, tail = text.split("# --- the same in plain torch")
        assert old in head, f"fault {fault}: the kernel of {name} holds no {old!r}"
        changed = head.replace(old, new)
        files[fault] = folder / f"{fault}.py"
        files[fault].write_text(changed + "# --- the same in plain torch" + tail, encoding="utf-8")
    checked = check_files(list(files.values()), workers=1)
    return dict(zip(files, checked, strict=True))


@pytest.mark.parametrize("name", REFERENCES)
def test_sound_kernel_passes(name: str, results: dict[str, CheckResult]) -> None:
    assert results[name].problem is None
    assert results[name].error is not None and results[name].error < 0.5


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, results: dict[str, CheckResult]) -> None:
    assert results[fault].problem is not None and "AssertionError" in results[fault].problem


def test_running_the_file_exits_with_zero_or_one(folder: Path, results: dict[str, CheckResult]) -> None:
    sound = subprocess.run([sys.executable, str(dumped(folder, "rms_norm"))], capture_output=True, text=True)
    assert sound.returncode == 0 and "rms_norm: largest error" in sound.stdout
    wrong = subprocess.run([sys.executable, str(folder / "scaled.py")], capture_output=True, text=True)
    assert wrong.returncode != 0 and "times the tolerance" in wrong.stderr


@pytest.mark.parametrize("name", REFERENCES)
def test_file_stands_alone(name: str, folder: Path) -> None:
    text = dumped(folder, name).read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        assert not isinstance(node, ast.ImportFrom)
    assert imported <= {"math", "os", "torch", "triton", "triton.language"}
    assert dumped(folder, name).with_suffix(".cpp").read_text() == "// C++\n"


def test_docstring_says_what_and_how_much(folder: Path) -> None:
    text = ast.get_docstring(ast.parse(dumped(folder, "rms_norm").read_text(encoding="utf-8"))) or ""
    assert "inv_rms = rsqrt(" in text and "x: float32 [B, S, 33], input" in text
    assert "cost at B = 1, S = 128" in text and "operations" in text


def test_same_kernel_is_written_once_and_a_second_one_of_its_name_is_refused(tmp_path: Path) -> None:
    kernel = by_hand.rms_norm()
    entries = [KernelDump(kernel, REFERENCES["rms_norm"], (f"layer {i}",)) for i in range(2)]
    result = dump_all(entries, tmp_path, [], SIZES)
    assert [path.name for path in result.files] == ["rms_norm.py"]
    text = result.files[0].read_text(encoding="utf-8")
    assert "used by 2" in text and "layer 0" in text and "layer 1" in text
    with pytest.raises(ValueError, match="two different kernels are called 'rms_norm'"):
        dump_all([*entries, KernelDump(by_hand.rms_norm(5), "")], tmp_path, [], SIZES)


def test_binaries_and_resource_table(tmp_path: Path) -> None:
    result = dump_kernel(by_hand.rms_norm(), REFERENCES["rms_norm"], tmp_path, [SM_90], None, SIZES)
    assert result.problems == ()
    assert (tmp_path / "rms_norm.sm_90.cubin").read_bytes()[:4] == b"\x7fELF"
    assert ".target sm_90a" in (tmp_path / "rms_norm.sm_90.ptx").read_text()
    (row,) = json.loads((tmp_path / "resources.json").read_text())
    assert row["kernel"] == "rms_norm" and row["spilled_bytes"] == 0 and row["registers"] > 0
    assert "| rms_norm | sm_90 |" in (tmp_path / "resources.md").read_text()
    assert "roofline sm_90" in (tmp_path / "rms_norm.py").read_text()


def test_check_sizes_keep_every_extent_positive() -> None:
    assert check_sizes_of(by_hand.rms_norm()) == {"B": 5, "S": 6}


@pytest.mark.parametrize("name", FORMATS)
def test_plain_decode_equals_the_format_bit_for_bit(name: str) -> None:
    stored = get_format(name)
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (3, 2 * stored.block_bytes), generator=generator, dtype=torch.uint8)
    space: dict[str, object] = {"torch": torch}
    exec(decode_source(name), space)
    got = space[f"decode_{name.lower()}"](data, name, 2 * stored.block)  # type: ignore[operator]
    want = stored.decode_rows(data, 2 * stored.block)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num().view(torch.int32), want.nan_to_num().view(torch.int32))


def run_reference(gm: fx.GraphModule, arguments: Sequence[object]) -> object:
    space: dict[str, object] = {"torch": torch}
    exec(reference_source(gm), space)
    return space["reference"](*arguments)  # type: ignore[operator]


def test_reference_source_computes_what_the_graph_does() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left, right = (x @ y).split(3, dim=-1)
            return torch.ops.torchweld.rope(
                left[..., :2], right[..., :2], right[..., :2], False
            ), right.softmax(-1)

    x, y = torch.randn(2, 5, 4), torch.randn(4, 6)
    exported = torch.export.export(Model(), (x, y), dynamic_shapes=({1: torch.export.Dim("s", min=2)}, None))
    gm = exported.graph_module
    size = next(str(s) for n in gm.graph.nodes if n.op == "placeholder" for s in n.meta["val"].shape[1:2])
    text = reference_source(gm)
    assert "ops.torchweld" not in text and f", {size}):" in text
    got, want = run_reference(gm, (x, y, 5)), Model()(x, y)
    assert isinstance(got, tuple)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reference_refuses_what_it_cannot_spell() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    graph.output((graph.call_function(len, (x,)),))
    with pytest.raises(NotImplementedError, match="expected an operation"):
        reference_source(fx.GraphModule(torch.nn.Module(), graph))
