"""Random and hand-written programs with their kernels printed in Triton, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.pipeline.edge_cases import CASES

ROOT = Path(__file__).parents[2]
SEEDS = tuple(str(number) for number in range(0, 80, 2))
#: What Triton's interpreter cannot do although the kernel is right; an entry that works is an error.
BROKEN = MappingProxyType({"integers: logic on numbers": "'&' of a tile and a single truth: bitwise_and"})


def problems(names: tuple[str, ...], folder: Path) -> dict[str, str | None]:
    """What is wrong with each program; one process for all."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.pipeline.triton_programs", str(folder), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    no_answer = f"no answer: {done.stderr[-500:]}"
    return dict.fromkeys(names, no_answer) | {answer["name"]: answer["problem"] for answer in answers}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("part", range(4))
def test_random_programs(part: int, tmp_path: Path) -> None:
    for name, problem in problems(SEEDS[part::4], tmp_path).items():
        assert problem is None, f"seed {name}: {problem}"


@pytest.mark.timeout(400)
def test_edge_cases(tmp_path: Path) -> None:
    for name, problem in problems(tuple(CASES), tmp_path).items():
        if name in BROKEN:
            assert problem is not None, f"{name} works now: take it out of BROKEN"
            assert BROKEN[name].rpartition(": ")[2] in problem
        else:
            assert problem is None, problem
