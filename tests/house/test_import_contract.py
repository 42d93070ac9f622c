"""The import contract holds for the tree, and each clause of it catches a planted import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("graph", "passes", "codegen", "optimizer", "decoding", "models")
DOWN_ONLY = "Imports between rooms go down only"
MODELS_SEE_LITTLE = "models imports graph.ops and graph.formats, and nothing else of ours"
NO_MODELS_BELOW = "graph, passes and codegen know no model definitions"
NO_FRONT_DOOR = "no room imports the public names of torchweld itself"
NO_CYCLES = "no import cycles inside a room"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Copy the rooms and the contract; src/torchweld keeps its links, which then lead to the copied rooms."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", *ROOMS):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def plant(tree: Path, file: str, line: str) -> None:
    """Write a module of one import."""
    (tree / file).write_text(f'"""Planted."""\n\n{line}\n', encoding="utf-8")


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run lint-imports on the copied tree (PYTHONPATH comes before any installed torchweld)."""
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_tree_keeps_the_contract(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("graph/planted.py", "import torchweld.passes", DOWN_ONLY),
        ("passes/planted.py", "from torchweld import codegen", DOWN_ONLY),
        ("codegen/planted.py", "import torchweld.passes", DOWN_ONLY),
        ("codegen/planted.py", "def late() -> None:\n    import torchweld.optimizer", DOWN_ONLY),
        ("optimizer/planted.py", "import torchweld.decoding", DOWN_ONLY),
        ("models/planted.py", "import torchweld.passes", MODELS_SEE_LITTLE),
        ("models/planted.py", "import torchweld.graph.planted_capture", MODELS_SEE_LITTLE),
        ("passes/planted.py", "import torchweld.models", NO_MODELS_BELOW),
        ("graph/planted.py", "import torchweld.models", NO_MODELS_BELOW),
        ("decoding/planted.py", "import torchweld", NO_FRONT_DOOR),
        ("graph/planted.py", "import torchweld.graph.planted_partner", NO_CYCLES),
    ],
)
def test_planted_import_is_caught(tree: Path, file: str, line: str, contract: str) -> None:
    plant(tree, "graph/planted_capture.py", "import torch")
    plant(tree, "graph/planted_partner.py", "import torchweld.graph.planted")
    plant(tree, "graph/planted.py", "import torch")
    plant(tree, file, line)
    done = lint(tree)
    assert done.returncode == 1, done.stdout
    assert f"{contract} BROKEN" in done.stdout
    assert "planted" in done.stdout


@pytest.mark.parametrize("line", ["import torchweld.graph.ops", "from torchweld.graph import formats"])
def test_models_may_import_ops_and_formats(tree: Path, line: str) -> None:
    plant(tree, "models/planted.py", line)
    assert f"{MODELS_SEE_LITTLE} KEPT" in lint(tree).stdout


def test_new_room_must_be_placed_in_the_contract(tree: Path) -> None:
    (tree / "serving").mkdir()
    plant(tree, "serving/__init__.py", "import torch")
    (tree / "src" / "torchweld" / "serving").symlink_to("../../serving")
    done = lint(tree)
    assert done.returncode == 1
    assert "serving" in done.stdout
