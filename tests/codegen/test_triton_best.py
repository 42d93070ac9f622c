"""Searched products in Triton: the reference interpreter's choices, dumped, checked and compiled for GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.fusion_cases import FusionCase, numbers
from torchweld.codegen.dump import DumpResult, KernelDump, check_files, dump_all
from torchweld.codegen.gpu_build import build_for_gpus
from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.reference import group_reference
from torchweld.codegen.triton import build_triton
from torchweld.graph.target import GFX942, SM_80, SM_90
from torchweld.passes import FUSE

ROOT = Path(__file__).parents[2]
TARGETS = (SM_80, SM_90, GFX942)
PROPERTIES = ("as_the_interpreter", "as_the_stored_scores", "with_the_usual_tiles")


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What is wrong with each property; all of them in one process, which is Triton's interpreter."""
    folder = tmp_path_factory.mktemp("triton-best")
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.triton_best_cases", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict.fromkeys(PROPERTIES, f"no answer: {done.stderr[-500:]}") | {
        a["case"]: a["problem"] for a in answers
    }


@pytest.mark.parametrize("name", PROPERTIES)
def test_choices_in_tritons_interpreter(name: str, problems: dict[str, str | None]) -> None:
    assert problems[name] is None, problems[name]


def searched(m: object, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Rows of their own, so that the two are two searches."""
    greedy = F.linear(x, m.w, m.b).argmax(-1)  # type: ignore[attr-defined]
    return greedy, *torch.topk(torch.tanh(F.linear(y, m.w) / 30) * 30, 5)  # type: ignore[attr-defined]


def entries_of(dtype: torch.dtype) -> list[KernelDump]:
    """The two kernels of `searched`, with their references."""
    w, b = numbers(300, 48, seed=1).to(dtype), numbers(300, seed=2).to(dtype)
    rows = (numbers(5, 48).to(dtype), numbers(5, 48, seed=3).to(dtype))
    case = FusionCase(searched, *rows, dynamic=True, w=w, b=b)
    case.fuse(*FUSE)
    found = []
    for number, group in case.groups.groups.items():
        lowered = case.groups.lowered.get(number)
        if isinstance(lowered, LoweredGroup):
            found.append(KernelDump(lowered.kernel, group_reference(group, lowered), cpp_source="// C++\n"))
    return found


def dumped(dtype: torch.dtype, folder: Path) -> DumpResult:
    entries = entries_of(dtype)
    return dump_all(entries, folder, (), {size: 128 for entry in entries for size in entry.kernel.sizes})


def test_dumped_searches_check_themselves(tmp_path: Path) -> None:
    result = dumped(torch.float32, tmp_path)
    assert result.problems == () and len(result.files) == 2
    for check in check_files(result.files, workers=1):
        assert check.problem is None and check.error is not None and check.error < 0.5


@pytest.mark.slow
def test_searches_compile_for_gpus() -> None:
    kernels = [build_triton(entry.kernel) for entry in entries_of(torch.float32)]
    builds = build_for_gpus(kernels, TARGETS)
    assert len(builds) == 2 * len(TARGETS)
    for build in builds:
        # A dump answers spills with smaller tiles.
        assert build.binary and (build.problem is None or build.has_spilled), (
            f"{build.target}: {build.problem}"
        )


def test_programs_are_counted_by_rows_alone() -> None:
    for entry in entries_of(torch.float32):
        (size,) = entry.kernel.sizes
        assert f"return triton.cdiv({size}, 16)" in build_triton(entry.kernel).launcher


def test_several_wide_scores_are_a_problem_of_the_dump_and_one_is_not(tmp_path: Path) -> None:
    result = dumped(torch.float64, tmp_path)
    (problem,) = result.problems
    assert "a search for several float64 scores of a row has no Triton" in problem
    assert len(result.files) == 1 and len(list(tmp_path.glob("*.cpp"))) == 2
    with pytest.raises(NotImplementedError, match="several float64 scores"):
        for entry in entries_of(torch.float64):
            build_triton(entry.kernel)
