"""The doctor on this machine: complete, and calm about what is missing."""

import io
import json
import platform
from pathlib import Path

import pytest
from rich.console import Console

from torchweld.optimizer.doctor import Diagnosis, examine
from torchweld.optimizer.environment import VARIABLES

PASSES = ("fuse_vertical",)


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return examine(PASSES, {})


def render(diagnosis: Diagnosis) -> str:
    stream = io.StringIO()
    diagnosis.render(Console(file=stream, width=100))
    return stream.getvalue()


def test_names_everything(diagnosis: Diagnosis) -> None:
    text = render(diagnosis)
    for word in ("memory read", "GB/s", "GFLOP/s", "torch", "triton", "compiler", "cache", "features"):
        assert word in text
    for variable in VARIABLES:
        assert variable.name in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_ceilings_are_those_of_the_target(diagnosis: Diagnosis) -> None:
    assert diagnosis.target.read_gb_s > 0
    assert f"{diagnosis.target.read_gb_s:.1f}" in render(diagnosis)


def test_json_round_trip(diagnosis: Diagnosis) -> None:
    content = json.loads(diagnosis.to_json())
    assert content["target"]["read_gb_s"] == diagnosis.target.read_gb_s
    assert dict(content["versions"])["torch"].startswith("2.")


def test_values_of_variables_are_shown_and_judged() -> None:
    found = examine(PASSES, {"TORCHWELD_SKIP": "fuse_vertcal", "TORCHWELD_FUEL": "3"})
    values = {name: value for name, value, _, _ in found.variables}
    assert (values["TORCHWELD_SKIP"], values["TORCHWELD_FUEL"]) == ("fuse_vertcal", "3")
    assert any("fuse_vertical" in problem for problem in found.problems)


def test_refused_cache_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "cache"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(open_to_all))
    found = examine(PASSES, {})
    assert found.cache.refused is not None and "other users" in found.cache.refused
    assert any("other users" in problem for problem in found.problems)


def test_no_compiler_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = examine(PASSES, {})
    if found.compiler is None:  # else ziglang is installed
        assert any("no C++ compiler" in problem for problem in found.problems)
        assert "none: graphs run eagerly" in render(found)
    else:
        assert "ziglang" in found.compiler[0]


@pytest.mark.parametrize(
    ("value", "shown"), [("portable", "portable (-march="), ("sse9", "none: there is no compiler")]
)
def test_instructions_are_shown_and_judged(value: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("names flags of x86 compilers")
    monkeypatch.setenv("TORCHWELD_ISA", value)
    found = examine(PASSES)
    assert shown in found.instructions and found.instructions in render(found)
    assert any("TORCHWELD_ISA=sse9: expected one of" in problem for problem in found.problems) == (
        value == "sse9"
    )
