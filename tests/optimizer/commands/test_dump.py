"""`torchweld dump` on a small model: which files there are, and that they check themselves."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from torchweld.models.load import LoadedModel
from torchweld.optimizer.commands.dump import TARGETS, dump_job, parse_targets
from torchweld.optimizer.commands.subject import Job, Subject, Wish, explain_subject
from torchweld.optimizer.suggest import UnknownNameError


class Two(nn.Module):
    """Two layers with the same kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.silu(layer(x)) + x
        return x


@pytest.fixture(scope="module")
def job() -> Job:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 16),)
    loaded = LoadedModel(Two().eval(), None, inputs, "two", "Two", Path("two"), "other")
    return explain_subject(Subject(loaded, inputs), Wish(threads=1), gate=False)


def dump(job: Job, targets: tuple[str, ...], out: Path, *, check: bool = False) -> tuple[bool, str]:
    stream = io.StringIO()
    good = dump_job(job, targets, out, Console(file=stream, width=100), check=check)
    return good, stream.getvalue()


def test_cpu_files_check_themselves(job: Job, tmp_path: Path) -> None:
    good, text = dump(job, ("cpu",), tmp_path, check=True)
    assert good, text
    kernels = {launch.kernel for launch in job.report.launches}
    assert {path.stem for path in tmp_path.glob("*.py")} == kernels
    assert {path.stem for path in tmp_path.glob("*.cpp")} == kernels
    assert f"{len(kernels)} self-checks run" in text
    assert "layer 0" in "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.py"))


def test_gpu_binaries_and_resources(job: Job, tmp_path: Path) -> None:
    good, text = dump(job, ("sm_90",), tmp_path)
    assert good, text
    assert list(tmp_path.glob("*.sm_90.cubin")) and not list(tmp_path.glob("*.cpp"))
    rows = json.loads((tmp_path / "resources.json").read_text(encoding="utf-8"))
    assert rows and all(row["spilled_bytes"] == 0 for row in rows)
    assert "sm_90" in text and "registers" in text and "not built" not in text


@pytest.mark.parametrize(("text", "names"), [("sm_90, cpu,sm_90", ("sm_90", "cpu")), ("cpu", ("cpu",))])
def test_targets_are_parsed(text: str, names: tuple[str, ...]) -> None:
    assert parse_targets(text) == names
    assert set(names) <= set(TARGETS)


@pytest.mark.parametrize("text", ["", " , ", "sm_91", "CPU"])
def test_unknown_targets_are_refused(text: str) -> None:
    with pytest.raises(UnknownNameError, match="--target: unknown target"):
        parse_targets(text)
