"""The command line: what it prints, its exit codes, and one line instead of every traceback."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchweld.codegen.cache import Cache, make_key
from torchweld.optimizer.cli import app, run

COMMANDS = ("optimize", "explain", "dump", "check", "bench", "passes", "doctor", "cache")
SCRIPT = "import sys; from torchweld.optimizer.cli import main; sys.exit(main())"

TINY = '''
import torch
from torch import nn

class Tiny(nn.Module):
    """Two layers, so that kernels per layer has something to count."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(self.norm(x)))
        return x

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x

def tiny():
    torch.manual_seed(0)
    return Tiny(), (torch.randn(2, 5, 16),)

def branching():
    return Branching(), (torch.randn(2, 3),)

def without_inputs():
    return Tiny()

def on_cuda():
    return Tiny().to("cuda"), (torch.randn(2, 5, 16),)

def on_meta():
    return Tiny().to("meta"), (torch.randn(2, 5, 16, device="meta"),)

def broken():
    raise RuntimeError("first line\\nsecond line")
'''


@dataclass(frozen=True)
class Done:
    """What one command line did."""

    code: int
    out: str
    err: str


class Runner:
    """Runs command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Done:
        self.capsys.readouterr()
        code = run(app, [str(argument) for argument in arguments])
        return Done(code, *self.capsys.readouterr())


@pytest.fixture
def torchweld(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


@pytest.fixture
def models(tmp_path: Path) -> str:
    """A Python file with factories; use as f"{models}:tiny"."""
    path = tmp_path / "models_of_test.py"
    path.write_text(textwrap.dedent(TINY), encoding="utf-8")
    return str(path)


def check_refused(done: Done, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds `words`; nothing on stdout."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.count("\n") == 1 and done.err.startswith("torchweld: "), done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


def test_help_names_every_command_and_loads_no_torch() -> None:
    script = (
        "import sys; from torchweld.optimizer.cli import app, run; code = run(app, ['--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f" {command} " in done.stdout


@pytest.mark.parametrize("command", [[], ["cache"]])
def test_no_command_shows_help(torchweld: Runner, command: list[str]) -> None:
    done = torchweld(*command)
    assert done.code == 2
    assert "Usage: torchweld" in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["expalin", "smollm2"], ["unknown command 'expalin'", "'explain'"]),
        (["zzzzzz"], ["unknown command 'zzzzzz'; the nearest valid one is "]),
        (["explain", "smollm2", "--jsn"], ["unknown option '--jsn'", "'--json'", "torchweld explain --help"]),
        (["bench", "smollm2", "--qqqq"], ["unknown option '--qqqq'; the nearest valid one is '--"]),
        (["explain", "smollm2", "--no-chekc"], ["'--no-check'"]),
        (["cache", "claer"], ["unknown command 'claer'", "'clear'", "torchweld cache --help"]),
        (["explain"], ["Missing argument 'MODEL'"]),
        (["explain", "smollm2", "--seq", "0"], ["--seq"]),
        (["bench", "smollm2", "--rounds", "many"], ["--rounds"]),
        (["explain", "smollm2", "--guide", "measured"], ["unknown guide 'measured'", "'measure'"]),
        (["dump", "smollm2", "--out", "x", "--target", "cpu,sm_91"], ["unknown target 'sm_91'", "'sm_90'"]),
        (["optimize", "smollm2", "--out", "report.jsn"], ["--out report.jsn", "'.json'"]),
        (["passes", "fuse_vertcal"], ["unknown pass 'fuse_vertcal'", "'fuse_vertical'"]),
    ],
)
def test_mistyped_names_are_answered_with_the_nearest(
    torchweld: Runner, arguments: list[str], words: list[str]
) -> None:
    check_refused(torchweld(*arguments), *words)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("branching", ["models_of_test.py", "if x.sum() > 0:", "torch.where"]),
        ("without_inputs", ["gives no example inputs", "return (module, (tensor, ...))"]),
        ("on_cuda", ["CUDA"]),
        ("on_meta", ["tensors on the device 'meta'", "expected cpu"]),
        ("broken", ["RuntimeError", "first line second line"]),
        ("tinny", ["has no function 'tinny'", "'tiny'"]),
    ],
)
def test_unusable_factories(torchweld: Runner, models: str, factory: str, words: list[str]) -> None:
    check_refused(torchweld("explain", f"{models}:{factory}"), *words)


@pytest.mark.parametrize("command", ["optimize", "explain", "check", "bench"])
def test_no_such_model(torchweld: Runner, command: str) -> None:
    check_refused(torchweld(command, "smolm2"), "smolm2: no such model", "'smollm2'")


def test_damaged_files(torchweld: Runner, tmp_path: Path) -> None:
    cases = {
        "cut.gguf": b"GGUF\x03\x00\x00\x00\xff\xff",
        "empty.gguf": b"",
        "text.gguf": b"not a model\n" * 10,
        "model.pt2": b"PK\x03\x04 damaged",
        "weights.pth": b"\x80\x02pickle",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        check_refused(torchweld("explain", tmp_path / name), name)


def test_folder_with_a_wrong_header(torchweld: Runner, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    check_refused(torchweld("explain", tmp_path), str(tmp_path))


def test_unknown_architecture(torchweld: Runner, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "perceptron"}', encoding="utf-8")
    check_refused(torchweld("explain", tmp_path), "perceptron")


def test_explain_json(torchweld: Runner, models: str) -> None:
    done = torchweld("explain", f"{models}:tiny", "--json")
    assert (done.code, done.err) == (0, "")
    content = json.loads(done.out)
    assert content["model"] == "tiny"
    assert content["eager_fallbacks"] == 0
    assert 1 <= content["kernels_per_layer"] <= 8
    assert 1.0 <= content["bytes_over_minimum"] <= 1.15
    assert 0.0 <= content["max_relative_error"] < 1e-4
    assert {"fuse_vertical", "fuse_horizontal"} <= {record["name"] for record in content["passes"]}
    assert content["kernels"] and content["phases"]


def test_explain_faces(torchweld: Runner, models: str) -> None:
    table = torchweld("explain", f"{models}:tiny", "--no-check", "--seq", "7", "--batch", "3")
    assert table.code == 0
    assert "not checked" in table.out and "fuse_vertical" in table.out.replace("\n", "")
    assert max(len(line) for line in table.out.splitlines()) <= 100
    markdown = torchweld("explain", f"{models}:tiny", "--markdown", "--no-check")
    assert markdown.out.startswith("# tiny on ")


def test_optimize_writes_its_report(torchweld: Runner, models: str, tmp_path: Path) -> None:
    done = torchweld("optimize", f"{models}:tiny", "--out", tmp_path / "report.json")
    assert done.code == 0
    assert "kernels per layer" in done.out
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["schema"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(torchweld: Runner, models: str, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    report.symlink_to("/dev/full")
    done = torchweld("optimize", f"{models}:tiny", "--out", report)
    assert done.code == 2
    assert "the disk is full" in done.err and done.err.count("\n") == 1


def test_check_passes_on_a_right_model(torchweld: Runner, models: str) -> None:
    done = torchweld("check", f"{models}:tiny")
    assert done.code == 0, done
    assert "within the tolerance table" in done.out
    content = json.loads(torchweld("check", f"{models}:tiny", "--json").out)
    names = [stage["name"] for stage in content["stages"]]
    assert content["ok"] and (names[0], names[-1]) == ("captured", "executable")
    assert any(name.startswith("fuse_") for name in names)


def test_bench(torchweld: Runner, models: str) -> None:
    done = torchweld("bench", f"{models}:tiny", "--rounds", "2", "--threads", "1", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["rounds"] == 2


def test_passes_are_listed_with_their_five_lines(torchweld: Runner) -> None:
    done = torchweld("passes")
    assert done.code == 0
    assert done.out.count("  before: ") == done.out.count("  legal:  ") > 10
    one = torchweld("passes", "fuse_vertical")
    assert one.out.startswith("fuse_vertical (") and one.out.count("  before: ") == 1
    content = json.loads(torchweld("passes", "--json").out)
    assert all(card["why"] and card["source"] for card in content)


def test_doctor_json(torchweld: Runner) -> None:
    done = torchweld("doctor", "--json")
    assert done.code == 0
    assert len(json.loads(done.out)["variables"]) == 7


def test_cache_commands(torchweld: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(tmp_path / "cache"))
    folder = Path(torchweld("cache", "path").out.strip())
    assert folder.is_dir() and folder.is_relative_to(tmp_path)
    assert "0 entries" in torchweld("cache", "list").out
    Cache().put(make_key("one"), b"data", {"name": "some kernel"})
    listed = torchweld("cache", "list").out
    assert "1 entry" in listed and "some kernel" in listed
    assert "1 entry deleted" in torchweld("cache", "clear").out
    assert "0 entries" in torchweld("cache", "list").out


def test_bad_variable_is_one_line(torchweld: Runner, models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWELD_SKIP", "fuse_vertcal")
    check_refused(torchweld("explain", f"{models}:tiny"), "TORCHWELD_SKIP", "'fuse_vertical'")


def test_skipped_pass_does_nothing(torchweld: Runner, models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWELD_SKIP", "fuse_vertical")
    content = json.loads(torchweld("explain", f"{models}:tiny", "--json", "--no-check").out)
    assert sum(p["applied"] for p in content["passes"] if p["name"] == "fuse_vertical") == 0


def test_exit_codes_reach_the_shell(models: str) -> None:
    command = [sys.executable, "-c", SCRIPT]
    unknown = subprocess.run([*command, "expalin"], capture_output=True, text=True, timeout=60, check=False)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    bad = subprocess.run(
        [*command, "explain", f"{models}:branching"], capture_output=True, text=True, timeout=100, check=False
    )
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1, bad.stderr


def test_reader_that_goes_away_leaves_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, "-c", SCRIPT, "passes"]
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_named_cache_folder_that_cannot_be_used_is_bad_input(
    torchweld: Runner, models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    done = torchweld("explain", f"{models}:tiny")
    assert done.code == 2 and "the kernel cache is not used" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert torchweld("doctor").code == 0
