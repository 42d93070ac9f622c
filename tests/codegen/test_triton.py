"""Printed Triton kernels compute what the reference interpreter says, in Triton's interpreter."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sympy import Integer

from tests import kernels_by_hand as by_hand
from torchweld.codegen.ir import Bind, Buffer, Kernel, RowPart, Schedule, Store
from torchweld.codegen.triton import build_triton, helper_sources, print_kernel
from torchweld.codegen.triton_schedule import MAX_SHRINK, gpu_schedule
from torchweld.codegen.triton_text import FLOAT_SPELLINGS, SPELLINGS
from torchweld.graph.terms import OPS, Axis, Fold, Load, Monoid, Ref, op

ROOT = Path(__file__).parents[2]


def case_names() -> list[str]:
    """The cases' names, read without importing the module, which would make this process an interpreter."""
    code = "from tests.codegen.triton_cases import CASES; print(*CASES)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


NAMES = case_names()


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What is wrong with each case; all of them in one process."""
    folder = tmp_path_factory.mktemp("triton-cases")
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.triton_cases", str(folder), *NAMES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict.fromkeys(NAMES, f"no answer: {done.stderr[-500:]}") | {
        a["case"]: a["problem"] for a in answers
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_reference_interpreter(name: str, problems: dict[str, str | None]) -> None:
    assert problems[name] is None, problems[name]


def test_every_operation_is_spelled() -> None:
    assert set(SPELLINGS) | {"cast", "bitcast"} == set(OPS)
    helpers = {s.helper for s in (*SPELLINGS.values(), *FLOAT_SPELLINGS.values()) if s.helper}
    assert helpers <= set(helper_sources())


@pytest.mark.parametrize("name", by_hand.ALL)
def test_golden_text(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"triton/{name}.py.txt", print_kernel(by_hand.ALL[name]()))


@pytest.mark.parametrize("shrink", range(MAX_SHRINK + 1))
@pytest.mark.parametrize("name", by_hand.ALL)
def test_every_size_of_tile_prints(name: str, shrink: int) -> None:
    printed = build_triton(by_hand.ALL[name](), shrink)
    ast.parse(printed.source)
    ast.parse(printed.launcher)


def test_a_schedule_of_its_own_is_kept_until_it_must_shrink() -> None:
    mine = Schedule(block_rows=64, block_n=128)
    part = replace(by_hand.norm_gated_linear().parts[0], schedule=mine)
    assert gpu_schedule(part) == mine
    assert gpu_schedule(part, 1).block_n < 128


def test_masked_loads_name_what_masked_lanes_hold() -> None:
    for make in by_hand.ALL.values():
        for node in ast.walk(ast.parse(print_kernel(make()))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                keywords = {keyword.arg for keyword in node.keywords}
                assert ("mask" in keywords) == ("other" in keywords)
                assert "mask" in keywords or "w_ptr" in ast.unparse(node)


def test_sizes_are_64_bits_wide_and_rows_do_not_overflow() -> None:
    text = print_kernel(by_hand.rms_norm())
    assert "B: tl.int64, S: tl.int64" in text
    assert "pid.to(tl.int64) *" in text


def test_a_kernel_named_like_its_buffer_still_launches() -> None:
    kernel = replace(by_hand.add_relu_broadcast(), name="x")
    printed = build_triton(kernel)
    assert printed.entry != "x" and f"{printed.entry}[(programs,)](x, bias, y" in printed.launcher
    assert build_triton(replace(kernel, name="sum")).entry != "sum"


def test_two_axes_of_one_padded_width_keep_their_own_masks() -> None:
    """A fold over 16 columns and a store of 9 share the text of their column index, not its bounds."""
    r, k, i = Axis("r", Integer(4)), Axis("k", Integer(16)), Axis("i", Integer(9))
    total = Fold(torch.float32, Monoid("sum"), (k,), Load(torch.float32, "x", (r.symbol, k.symbol)))
    value = op("mul", Load(torch.float32, "x", (r.symbol, i.symbol)), Ref(torch.float32, "total"))
    part = RowPart((r,), (i,), (Bind("total", total),), (Store("y", (r.symbol, i.symbol), value),))
    buffers = (
        Buffer("x", torch.float32, (Integer(4), Integer(16)), "input"),
        Buffer("y", torch.float32, (Integer(4), Integer(9)), "output"),
    )
    text = print_kernel(Kernel("scaled_cut", buffers, (), (part,)))
    assert "< 9" in next(line for line in text.splitlines() if "tl.store" in line)
