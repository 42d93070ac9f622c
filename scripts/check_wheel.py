"""Build the wheel, install it into an empty environment and use it there.

Run as `make wheel`. The rooms are reached through symlinks in src/torchweld, so three things can go wrong
unseen: links packed instead of files, data files left out, and a test that really used the editable install.
Hence: build from a copy of the tree (no stale build folder), both directly and through an sdist; compare the
content with the rooms file by file; install into a new environment that sees the dependencies of this one
but not its editable torchweld; there import every module, run the console script and compile through the
torch.compile entry point.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "torchweld"
TIME_LIMIT_SECONDS = 300

# Runs inside the new environment, in an empty folder; argv[1] is that environment's prefix.
PROBE = """
import importlib, pathlib, pkgutil, sys
import torch
import torchweld

prefix = pathlib.Path(sys.argv[1]).resolve()
found = pathlib.Path(torchweld.__file__).resolve()
assert found.is_relative_to(prefix), f"not the wheel: {found}"
names = [module.name for module in pkgutil.walk_packages(torchweld.__path__, "torchweld.")]
for name in names:
    importlib.import_module(name)

def gated(x, weight):
    return torch.nn.functional.silu(x @ weight) * x

x, weight = torch.randn(3, 8), torch.randn(8, 8)
with torch.no_grad():
    result = torch.compile(gated, backend="torchweld")(x, weight)
torch.testing.assert_close(result, gated(x, weight))
print(f"{len(names)} modules import; torch.compile(backend='torchweld') gives the eager result")
"""


class WheelError(Exception):
    """The wheel is not what the tree says; the message names the file or the command."""


def clean_environment(cwd: Path) -> dict[str, str]:
    """Return our environment variables without what would lead to another torchweld or another cache."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"TORCHWELD_CACHE_DIR": str(cwd / "torchweld-cache"), "PYTHONDONTWRITEBYTECODE": "1"}


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command in `cwd` and return its output; WheelError with that output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(cwd),
        timeout=TIME_LIMIT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise WheelError(f"exit code {done.returncode} from {command[0]} {command[1]}:\n{done.stdout}")
    return done.stdout


def copy_tree(target: Path) -> None:
    """Copy what a build reads, links kept as links, without environment, caches or an old build folder."""
    target.mkdir()
    links = [path for path in PACKAGE.iterdir() if path.is_symlink()]
    broken = [path.name for path in links if not path.is_dir()]
    if broken:
        raise WheelError(f"src/torchweld: links that lead nowhere: {broken}")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for room in ("src", *(path.name for path in links)):
        shutil.copytree(ROOT / room, target / room, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)


def expected_files(source: Path) -> Iterator[str]:
    """Yield the name in the wheel of every file of every room below `source`."""
    # One level by hand, because Path.rglob does not follow the links that lead to the rooms.
    for entry in (source / "src" / "torchweld").iterdir():
        for path in [entry] if entry.is_file() else entry.rglob("*"):
            if path.is_file():
                yield path.relative_to(source / "src").as_posix()


def check_content(wheel: Path, expected: set[str]) -> None:
    """Raise WheelError unless the wheel holds exactly `expected`, as regular files, beside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        infos = [info for info in archive.infolist() if ".dist-info/" not in info.filename]
    links = [info.filename for info in infos if (info.external_attr >> 16) & 0o170000 == 0o120000]
    packed = {info.filename for info in infos}
    if links:
        raise WheelError(f"{wheel.name}: links instead of files: {links}")
    if packed != expected:
        missing, unknown = sorted(expected - packed), sorted(packed - expected)
        raise WheelError(
            f"{wheel.name}: missing {missing}, unexpected {unknown}; a folder needs an __init__.py, "
            "and a data file a pattern under [tool.setuptools.package-data]"
        )


def build_wheels(source: Path, out: Path) -> tuple[Path, Path]:
    """Build a wheel from the tree as a user would, and one through an sdist; return both."""
    pip_wheel: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    run([*pip_wheel, "--wheel-dir", out / "direct"], cwd=source)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out / "sdist"], cwd=source)
    (direct,) = (out / "direct").glob("*.whl")
    (through_sdist,) = (out / "sdist").glob("*.whl")
    return direct, through_sdist


def make_environment(prefix: Path) -> Path:
    """Make an environment that sees our dependencies and nothing of our editable install; return its Python.

    A path line in a .pth file is not searched for further .pth files, and that is where an editable install
    keeps its own path.
    """
    run([sys.executable, "-m", "venv", "--without-pip", prefix], cwd=prefix.parent)
    python = prefix / "bin" / "python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=prefix).strip()
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    Path(site, "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return python


def check_installed(wheel: Path, folder: Path) -> str:
    """Install the wheel into an empty environment below `folder` and use it there; return what it printed."""
    prefix, elsewhere = folder / "environment", folder / "elsewhere"
    elsewhere.mkdir()
    python = make_environment(prefix)
    pip_install: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--quiet",
    ]
    run([*pip_install, "--ignore-installed", wheel], cwd=elsewhere)
    script = prefix / "bin" / "torchweld"
    if not script.is_file():
        raise WheelError(f"{wheel.name}: no console script named torchweld")
    run([script, "--help"], cwd=elsewhere)
    probe = elsewhere / "probe.py"
    probe.write_text(PROBE)
    return run([python, probe, prefix], cwd=elsewhere).strip().splitlines()[-1]


def main() -> int:
    """Run every check; 0 if all pass, 1 with one message otherwise."""
    with tempfile.TemporaryDirectory(prefix="torchweld-wheel-") as name:
        folder = Path(name)
        try:
            copy_tree(folder / "source")
            expected = set(expected_files(folder / "source"))
            wheels = build_wheels(folder / "source", folder / "out")
            for wheel in wheels:
                check_content(wheel, expected)
            summary = check_installed(wheels[0], folder)
        except WheelError as error:
            print(f"wheel check failed: {error}", file=sys.stderr)
            return 1
    print(f"wheel check passed: {len(expected)} files, directly and through the sdist; {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
