"""What every test gets: one torch thread per worker, a kernel cache of its own, golden files."""

import os

# Before torch is imported: OpenMP reads its thread count once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from torchweld.codegen import toolchain

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

# Here kernels are compiled as users get them, with -O3. Elsewhere -O1 takes half of a compiler's time and gives the
# same bits: the flags forbid every change of arithmetic (tests/pipeline/test_optimization_levels.py compares the two).
AS_USERS = ("codegen", "pipeline", "benchmarks", "examples")

# Compilers and first calls are slow once and fast after, which Hypothesis would call flaky: no deadlines.
# derandomize is spelled out because Hypothesis turns it on by itself where it sees CI in the environment.
settings.register_profile(
    "dev", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile("fuzz", settings.get_profile("dev"), max_examples=200, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --update-golden."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden instead of comparing")
    parser.addoption("--full-optimization", action="store_true", help="compile every kernel with -O3")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Choose the compiler's optimization level by the test's folder, for its fixtures as well."""
    with pytest.MonkeyPatch.context() as patch:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in AS_USERS and not item.config.getoption("--full-optimization"):
            flags = tuple("-O1" if flag == "-O3" else flag for flag in toolchain.BASE_FLAGS)
            patch.setattr(toolchain, "BASE_FLAGS", flags)
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a file runs in one worker (--dist=loadfile, so that models which it compiles for
    many tests are compiled once), and no worker shall begin a long one when the other has nothing left."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def private_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give this worker a kernel cache that starts empty; the user's own is neither read nor written."""
    folder = tmp_path_factory.mktemp("torchweld-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHWELD_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return `golden(name, text)`: compare text with tests/golden/<name>, or write it with --update-golden.

    Convention: the folder is named after the pass or family (`golden("fuse_vertical/graph.txt", text)`).
    """

    def check_golden(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"no golden file {name}; make it with: pytest --update-golden"
        assert text == path.read_text(encoding="utf-8"), f"differs from golden file {name}"

    return check_golden
