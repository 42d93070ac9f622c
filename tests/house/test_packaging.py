"""What the package declares: links to rooms, pins, entry points; and the wheel check refuses bad wheels."""

import os
import re
import stat
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts.check_wheel import WheelError, check_content, copy_tree, expected_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "torchweld"
ROOMS = {"graph", "passes", "codegen", "optimizer", "decoding", "models"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENT_FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def requirement_lines(name: str) -> list[str]:
    """Return the lines of a requirements file that ask for a package."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


def distribution(requirement: str) -> str:
    """Return the normalised distribution name at the head of a requirement."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_room_is_a_relative_link() -> None:
    links = {path.name: os.readlink(path) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {room: f"../../{room}" for room in ROOMS}
    assert (PACKAGE / "py.typed").is_file()


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert folders
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", REQUIREMENT_FILES)
def test_requirements_are_pinned_and_name_no_host(name: str) -> None:
    lines = requirement_lines(name)
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+(; .*)?", line), f"{name}: not an exact pin: {line}"
    assert "://" not in (ROOT / name).read_text(encoding="utf-8")


def test_requirements_hold_every_dependency_at_the_version_of_the_lock() -> None:
    runtime = requirement_lines("requirements.txt")
    assert {distribution(line) for line in runtime} == {
        distribution(line) for line in PROJECT["dependencies"]
    }
    locked = {line.lower() for line in requirement_lines("requirements-lock.txt")}
    wanted = {line.lower() for line in (*runtime, *requirement_lines("requirements-dev.txt"))}
    assert {line.split(";")[0] for line in wanted} <= {line.split(";")[0] for line in locked}


def test_heavy_packages_are_extras_only() -> None:
    heavy = {"transformers", "onnx", "onnxruntime", "llama-cpp-python", "ziglang"}
    assert heavy.isdisjoint({distribution(line) for line in PROJECT["dependencies"]})
    extras = {distribution(line) for lines in PROJECT["optional-dependencies"].values() for line in lines}
    assert heavy <= extras


def test_entry_points() -> None:
    assert PROJECT["scripts"] == {"torchweld": "torchweld.decoding.cli:main"}
    backends = PROJECT["entry-points"]["torch_dynamo_backends"]
    assert backends == {"torchweld": "torchweld.optimizer.dynamo_backend:backend"}


def write_wheel(path: Path, names: list[str], link: str | None = None) -> Path:
    """Write a wheel of empty files, one of them optionally marked as a symlink."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*names, "torchweld-0.dist-info/RECORD"):
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name == link else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, "")
    return path


def test_wheel_check_accepts_exactly_the_tree(tmp_path: Path) -> None:
    names = ["torchweld/__init__.py", "torchweld/graph/kernel.j2"]
    check_content(write_wheel(tmp_path / "good.whl", names), set(names))
    with pytest.raises(WheelError, match=r"missing \['torchweld/graph/kernel.j2'\]"):
        check_content(write_wheel(tmp_path / "short.whl", names[:1]), set(names))
    with pytest.raises(WheelError, match=r"unexpected \['torchweld/graph/kernel.j2'\]"):
        check_content(write_wheel(tmp_path / "long.whl", names), set(names[:1]))
    with pytest.raises(WheelError, match="links instead of files"):
        check_content(write_wheel(tmp_path / "linked.whl", names, link=names[1]), set(names))


def test_expected_files_of_the_wheel_reach_into_every_room(tmp_path: Path) -> None:
    copy_tree(tmp_path / "source")
    names = set(expected_files(tmp_path / "source"))
    assert {"torchweld/__init__.py", "torchweld/py.typed"} <= names
    assert {f"torchweld/{room}/__init__.py" for room in ROOMS} <= names
    assert not [name for name in names if name.endswith(".pyc")]
