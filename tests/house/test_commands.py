"""The scripts behind the make targets: compiler note, fuzz loop, and the settings every test runs under."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]


def bash(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of our bash scripts with exactly the given environment."""
    program = shutil.which("bash")
    assert program is not None
    return subprocess.run(
        [program, str(ROOT / "scripts" / script), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def executable(path: Path, text: str = "exit 1") -> Path:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('sh')}\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_missing_compiler_is_explained_in_one_line(tmp_path: Path) -> None:
    python = executable(tmp_path / "python")
    done = bash("explain_compiler.sh", str(python), PATH=str(tmp_path))
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "no C++ compiler" in done.stderr and "eagerly" in done.stderr and "torchweld[zig]" in done.stderr


@pytest.mark.parametrize("name", ["g++", "c++", "clang++"])
def test_present_compiler_is_not_mentioned(tmp_path: Path, name: str) -> None:
    python = executable(tmp_path / "python")
    executable(tmp_path / "bin" / name)
    done = bash("explain_compiler.sh", str(python), PATH=str(tmp_path / "bin"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_compiler_from_cxx_or_ziglang_counts(tmp_path: Path) -> None:
    failing, working = executable(tmp_path / "python"), executable(tmp_path / "zig-python", "exit 0")
    compiler = executable(tmp_path / "mycc")
    assert bash("explain_compiler.sh", str(failing), PATH="", CXX=f"{compiler} -m64").stderr == ""
    assert bash("explain_compiler.sh", str(working), PATH="").stderr == ""


def test_too_old_python_is_refused_with_what_to_do(tmp_path: Path) -> None:
    old = executable(tmp_path / "bin" / "python3")
    dirname = shutil.which("dirname")
    assert dirname is not None
    (tmp_path / "bin" / "dirname").symlink_to(dirname)
    done = bash("setup_env.sh", str(tmp_path / "venv"), PATH=str(tmp_path / "bin"), PYTHON=str(old))
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr and "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("assert True", 0, "1 rounds"),
        ("assert False", 1, "repeat it with"),
        (None, 5, "no test is marked 'fuzz'"),
    ],
)
def test_fuzz_loop(tmp_path: Path, body: str | None, code: int, message: str) -> None:
    conftest = "import hypothesis\nhypothesis.settings.register_profile('fuzz', max_examples=1)\n"
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = fuzz\n", encoding="utf-8")
    mark = "import pytest\n@pytest.mark.fuzz\n" if body else ""
    test = textwrap.dedent(f"{mark}def test_one():\n    {body or 'assert True'}\n")
    (tmp_path / "test_one.py").write_text(test, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fuzz.py", "--seconds", "0", "test_one.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stdout + done.stderr


def test_make_lists_its_targets() -> None:
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "-C", str(ROOT), "help"], capture_output=True, text=True, check=True, timeout=60
    )
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    assert {"demo", "test", "fuzz", "lint", "types", "imports", "wheel", "clean"} <= listed


def test_workers_use_one_torch_thread() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert torch.get_num_threads() == 1


def test_cache_is_private_and_ours(private_cache_dir: Path) -> None:
    assert os.environ["TORCHWELD_CACHE_DIR"] == str(private_cache_dir)
    assert private_cache_dir.stat().st_mode & 0o077 == 0


def test_hypothesis_profiles() -> None:
    assert settings.get_profile("ci").derandomize
    assert not settings.get_profile("fuzz").derandomize
    assert all(settings.get_profile(name).deadline is None for name in ("dev", "ci", "fuzz"))


def test_golden_compares(golden: Callable[[str, str], None], request: pytest.FixtureRequest) -> None:
    golden("house/example.txt", "one\ntwo\n")
    if not request.config.getoption("--update-golden"):
        with pytest.raises(AssertionError, match="differs from golden"):
            golden("house/example.txt", "one\n")
        with pytest.raises(AssertionError, match="no golden file"):
            golden("house/absent.txt", "")
