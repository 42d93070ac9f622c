"""Triton attention: heads that share keys stand in one tile, programs share the keys of a tile, windows skip blocks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch

from tests import kernels_by_hand as by_hand
from tests.codegen.cached_cases import Problem, kernel_of
from torchweld.codegen.dump import fit_kernels
from torchweld.codegen.ir import AttentionPart, Kernel, part_terms
from torchweld.codegen.triton import build_triton, print_kernel, program_count
from torchweld.codegen.triton_heads import attend_of, group_heads
from torchweld.codegen.triton_schedule import gpu_schedule
from torchweld.graph.target import GPU_TARGETS
from torchweld.graph.terms import Load, Term, transform, walk

ROOT = Path(__file__).parents[2]


def attention_part(kernel: Kernel) -> AttentionPart:
    (part,) = kernel.parts
    assert isinstance(part, AttentionPart)
    return part


@pytest.mark.timeout(300)
def test_cases_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "tests/codegen/triton_attention_cases.py",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "6 passed" in done.stdout


def test_keys_and_values_do_not_depend_on_the_head_in_its_group() -> None:
    heads = group_heads(attention_part(kernel_of(Problem(6, 2, 16, 16, sinks=True))))
    assert heads.members is not None and heads.share == 3
    attend, member = attend_of(heads.part), heads.members.symbol
    for operand, depends in ((attend.q, True), (attend.k, False), (attend.v, False), (attend.sinks, True)):
        assert operand is not None
        symbols = {s for term in _loads(operand) for e in term.index for s in e.free_symbols}
        assert (member in symbols) == depends
    assert [axis.extent for axis in heads.rows] == [heads.part.t.extent, 3]
    assert heads.part.batch[-1].extent == 2


def _loads(root: Term) -> list[Load]:

    return [term for term in walk(root) if isinstance(term, Load)]


def test_one_key_head_needs_no_axis() -> None:
    heads = group_heads(attention_part(kernel_of(Problem(4, 1, 16, 16))))
    assert len(heads.part.batch) == 1 and heads.share == 4


def test_heads_with_keys_of_their_own_are_left_alone() -> None:
    part = attention_part(kernel_of(Problem(2, 2, 16, 16)))
    heads = group_heads(part)
    assert heads.part is part and heads.members is None and heads.rows == (part.t,)


def test_heads_with_a_past_of_their_own_are_left_alone() -> None:
    part = attention_part(kernel_of(Problem(4, 2, 16, 16)))
    attend = attend_of(part)
    past = Load(torch.int64, "past", (part.batch[-1].symbol,))
    odd = replace(part, attend=replace(part.attend, term=replace(attend, past=past)))
    assert group_heads(odd).members is None


@pytest.mark.parametrize(("rows", "share"), [(16, 1), (16, 2), (16, 3), (16, 24), (32, 5)])
def test_a_tile_reaches_all_of_its_queries(rows: int, share: int) -> None:
    heads = group_heads(attention_part(kernel_of(Problem(2, 1, 16, 16))))
    assert heads.members is not None
    heads = replace(
        heads, members=None if share == 1 else replace(heads.members, extent=sympy.Integer(share))
    )
    for tile in range(50):
        front = eval(heads.first_query(rows), {"query_tile": tile})
        end = eval(heads.end_query(rows, str(front)))
        assert front == tile * rows // share
        assert (tile * rows + rows - 1) // share + 1 <= end <= front + rows // share + 2


def test_programs_count_key_heads_and_splits() -> None:
    part = attention_part(kernel_of(Problem(8, 2, 64, 64)))
    schedule = gpu_schedule(part)
    count = program_count(part, schedule, "cdiv", "splits")
    sizes = {str(s): 1 for axis in (*part.batch, part.t) for s in axis.extent.free_symbols}
    assert eval(count, {"cdiv": lambda a, b: -(-a // b), "splits": 7, **sizes}) == 2 * 7


def test_keys_are_split_where_queries_may_be_few() -> None:
    whole_text = by_hand.attention()
    assert gpu_schedule(attention_part(whole_text)).split_keys == 0
    assert "arrived" not in print_kernel(whole_text)
    assert gpu_schedule(attention_part(kernel_of(Problem()))).split_keys == 256
    part = attention_part(whole_text)
    attend = attend_of(part)
    few = replace(attend, s=replace(attend.s, extent=sympy.Integer(100)))
    known = replace(part, attend=replace(part.attend, term=few))
    assert gpu_schedule(known).split_keys == 0
    many = replace(attend, s=replace(attend.s, extent=sympy.Integer(1500)))
    cross = replace(part, attend=replace(part.attend, term=many))
    assert gpu_schedule(cross).split_keys == 256


def test_two_attentions_in_one_kernel_do_not_split() -> None:
    kernel = kernel_of(Problem())
    twice = replace(kernel, parts=kernel.parts * 2)
    assert build_triton(kernel).signature.keys() >= {"splits", "states_ptr", "arrived_ptr"}
    printed = build_triton(twice)
    assert "states_ptr" not in printed.signature and "split" not in printed.source


def test_the_header_says_what_a_program_does() -> None:
    text = print_kernel(kernel_of(Problem(6, 2, 16, 16)))
    assert "# One program per tile of 16 rows (3 heads that read one key head, for each query)" in text
    assert "split of 256 keys" in text


def test_every_literal_name_is_reserved() -> None:
    """A buffer may be called like a variable of the kernel."""
    kernel = kernel_of(Problem(2, 1, 16, 16))
    renamed = {
        buffer.name: name for buffer, name in zip(kernel.buffers, ("count", "tile", "base"), strict=False)
    }
    buffers = tuple(replace(b, name=renamed.get(b.name, b.name)) for b in kernel.buffers)
    part = attention_part(kernel)
    loads = {id(t): t for t in part_terms(part) if isinstance(t, Load)}

    def rename(term: Term) -> Load | None:
        if not isinstance(term, Load) or id(term) not in loads:
            return None
        return Load(term.dtype, renamed.get(term.buffer, term.buffer), term.index)

    attend = transform(part.attend.term, rename)
    part = replace(part, attend=replace(part.attend, term=attend))
    text = print_kernel(replace(kernel, buffers=buffers, parts=(part,)))
    assert re.search(r"count_\d+ = tl.load\(count_ptr", text) and "base_1 = tl.load(base_ptr" in text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kernels_fit_gpus_and_order_their_writes() -> None:
    problems = [
        Problem(2, 2, 64, 64),
        Problem(6, 2, 128, 128, window=512),
        Problem(4, 1, 256, 256, sinks=True),
    ]
    _, builds = fit_kernels([kernel_of(problem) for problem in problems], GPU_TARGETS)
    for build in builds:
        assert build.problem is None, f"{build.kernel} for {build.target}: {build.problem}"
        assert build.resources is not None and build.resources.spilled_bytes == 0
        if build.target.startswith("sm_"):
            barrier, count = build.assembly.split("atom.global.gpu.acq_rel.add", 1)
            after_write = barrier[barrier.rindex("st.global") :]
            assert "bar.sync" in after_write and "bar.sync" in count[: count.index("ld.global")]
        else:
            before, after = build.assembly.split("global_atomic_add", 1)
            after_write = before[before.rindex("global_store") :]
            assert "s_barrier" in after_write and "buffer_wbl2 sc1" in after_write
            assert "buffer_inv sc1" in after[: after.index("global_load")]
