"""Bytes and operations of kernels written by hand, counted on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sympy import Integer

from tests import kernels_by_hand
from tests.kernels_by_hand import B, S
from tests.passes.fusion_cases import lower, numbers
from torchweld.codegen.ir import Buffer, Kernel, MatmulPart, RowPart, Schedule, Store
from torchweld.codegen.work import HEAVY, buffer_bytes, kernel_work, moved_and_minimum, pointwise_operations
from torchweld.graph.index import evaluate
from torchweld.graph.terms import Axis, Const, Load, Term, op

F32 = torch.float32
CORES = 2
SIZES = {"B": 2, "S": 3}


def counts(kernel: Kernel, cores: int = CORES) -> tuple[int, int, int, int]:
    work = kernel_work(kernel, cores)
    reads, writes, flops = (evaluate(e, SIZES) for e in (work.reads, work.writes, work.flops))
    return reads, writes, flops, work.parts


def test_pointwise_work() -> None:
    """One addition and one comparison per element; the bias is read once."""
    points = 2 * 3 * 13
    assert counts(kernels_by_hand.add_relu_broadcast()) == (4 * points + 4 * 13, 4 * points, 2 * points, 1)


def test_16_bit_elements_are_half_the_bytes_and_one_cast_more() -> None:
    points = 2 * 3 * 13
    narrow = counts(kernels_by_hand.add_relu_broadcast(torch.bfloat16))
    assert narrow == (2 * points + 4 * 13, 2 * points, 3 * points, 1)


def test_a_norm_with_a_second_output() -> None:
    """Two products for y, one sum for the other; one product and one addition per summed element."""
    rows, points = 2 * 3, 2 * 3 * 33
    expected = (4 * points + 4 * 33, 2 * 4 * points, 3 * points + rows * 33 * 2, 1)
    assert counts(kernels_by_hand.rms_norm()) == expected


def test_two_parts() -> None:
    x, z = 2 * 37, 3 * 37
    exp, div = HEAVY["exp"], HEAVY["div"]
    soft = x * (1 + exp + div) + x * 1 + x * (1 + exp + 1)
    assert counts(kernels_by_hand.softmax_argmax()) == (4 * x + 4 * z, 4 * x + 8 * 3, soft + z, 2)


def test_a_gathered_table_counts_the_rows_that_are_read() -> None:
    kernel = kernels_by_hand.gather_and_concat(rows=1000)
    assert evaluate(buffer_bytes(kernel.buffer("table"), kernel), SIZES) == 2 * 5 * 4
    assert counts(kernel)[0] == 2 * 8 + 2 * 5 * 4 + 2 * 5 * 4


def test_a_table_that_is_also_read_whole_counts_whole() -> None:
    kernel = kernels_by_hand.gather_and_concat(rows=1000)
    b, d = Axis("bb", Integer(1000)), Axis("dd", Integer(5))
    at = (b.symbol, d.symbol)
    whole = RowPart((b,), (d,), (), (Store("copy", at, Load(F32, "table", at)),))
    both = replace(kernel, parts=(*kernel.parts, whole))
    assert evaluate(buffer_bytes(kernel.buffer("table"), both), SIZES) == 1000 * 5 * 4


def test_a_buffer_that_no_part_reads_counts_whole() -> None:
    kernel = kernels_by_hand.gather_and_concat()
    unread = Buffer("unread", F32, (Integer(7),), "input")
    assert evaluate(buffer_bytes(unread, kernel), SIZES) == 28


def test_a_gather_of_ids_in_two_dimensions_counts_each_of_them() -> None:
    lowered = lower(
        lambda m, i: torch.nn.functional.embedding(i, m.w),
        torch.zeros(2, 3, dtype=torch.int64),
        w=numbers(100, 4),
    )
    kernel = lowered.kernel
    assert evaluate(buffer_bytes(kernel.buffer("w"), kernel), {}) == 2 * 3 * 4 * 4


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_gated_linear_with_a_norm_in_front(cores: int) -> None:
    """Every core prepares the rows again; weights are decoded once per element, and read as they are stored."""
    rows, k, n = 2 * 3, 64, 24
    epilogue = rows * n * (1 + 1 + HEAVY["sigmoid"] + 1)
    prologue = cores * rows * k * 2 + 2 * cores * rows * k * 2
    products, decoding = 2 * 2 * rows * n * k, 2 * n * k * 6
    reads = 4 * rows * k + 4 * k + 2 * n * 68 + 4 * rows * n
    expected = (reads, 4 * rows * n, epilogue + prologue + products + decoding, 1)
    assert counts(kernels_by_hand.norm_gated_linear(), cores) == expected


def test_a_dense_weight_is_not_decoded() -> None:
    stored, dense = (
        counts(kernels_by_hand.norm_gated_linear()),
        counts(kernels_by_hand.norm_gated_linear("F32")),
    )
    assert stored[2] - dense[2] == 2 * 24 * 64 * 6
    assert dense[0] - stored[0] == 2 * 24 * (64 * 4 - 68)


def test_batched_matmuls() -> None:
    """2 * b * m * n * k, and one addition of the bias per element of the second."""
    flops = 2 * 2 * 3 * 19 * 7 + 2 * 3 * 17 * 7 + 3 * 17
    reads = 4 * (2 * 3 * 7 + 2 * 7 * 19 + 17 * 7 + 17)
    assert counts(kernels_by_hand.batched_matmul_pair()) == (reads, 4 * (2 * 3 * 19 + 3 * 17), flops, 2)


@pytest.mark.parametrize(("mask_kind", "share"), [("none", 1), ("causal", 0.5)])
def test_attention(mask_kind: str, share: float) -> None:
    """Per pair: two products of 16 features, one exponential and four more; half of the pairs under a causal mask."""
    pairs = 2 * 4 * 3 * 3
    reads = 4 * 2 * 3 * (4 * 16 + 2 * 2 * 16)
    flops = int(pairs * share) * (2 * (16 + 16) + HEAVY["exp"] + 4)
    assert counts(kernels_by_hand.attention(mask_kind)) == (reads, 4 * 2 * 3 * 64, flops, 1)


def test_shared_terms_are_computed_once() -> None:
    x: Term = Load(F32, "x", (Integer(0),))
    shared = op("exp", x)
    assert pointwise_operations(op("add", shared, shared)) == 1 + HEAVY["exp"]
    assert pointwise_operations(op("add", shared, op("exp", x))) == 1 + 2 * HEAVY["exp"]
    assert pointwise_operations(Const(F32, 1.0)) == 0


# -- what really moves ----------------------------------------------------------------------------------------


def three_readers(rows: int) -> Kernel:
    """Three parts that each read x[rows, 8] and write a result of their own."""
    parts = []
    for n in range(3):
        r, c = Axis(f"r{n}", Integer(rows)), Axis(f"c{n}", Integer(8))
        at = (r.symbol, c.symbol)
        parts.append(RowPart((r,), (c,), (), (Store(f"y{n}", at, op("neg", Load(F32, "x", at))),)))
    shape = (Integer(rows), Integer(8))
    outputs = tuple(Buffer(f"y{n}", F32, shape, "output") for n in range(3))
    return Kernel("three", (Buffer("x", F32, shape, "input"), *outputs), (), tuple(parts))


def test_a_buffer_that_fits_the_cache_moves_once() -> None:
    once = 4 * 16 * 8
    assert moved_and_minimum(three_readers(16), {}, l2_bytes=2 * once) == (4 * once, 4 * once)


def test_a_large_buffer_moves_once_per_part_that_reads_it() -> None:
    """Outputs are written once however large they are."""
    once = 4 * 16 * 8
    assert moved_and_minimum(three_readers(16), {}, l2_bytes=2 * once - 2) == (6 * once, 4 * once)


def test_rows_of_a_matmul_move_once_per_tile_of_columns() -> None:
    kernel = kernels_by_hand.batched_matmul_pair()
    first, second = kernel.parts
    assert isinstance(first, MatmulPart) and isinstance(second, MatmulPart)
    narrow = replace(
        kernel,
        parts=(replace(first, schedule=Schedule(block_n=8)), replace(second, schedule=Schedule(block_n=17))),
    )
    sizes = {"B": 1, "S": 100}
    x, y, f, bias, c, e = (evaluate(buffer_bytes(buffer, kernel), sizes) for buffer in kernel.buffers)
    moved, minimum = moved_and_minimum(narrow, sizes, l2_bytes=0)
    assert minimum == x + y + f + bias + c + e
    # x comes for three tiles of 19 columns by 8 and one of 17 by 17; y is an input that is read for three tiles, too.
    assert moved - minimum == (3 + 1 - 1) * x + (3 - 1) * y
    assert moved_and_minimum(narrow, sizes, l2_bytes=1 << 30) == (minimum, minimum)


def test_a_gathered_table_moves_its_rows_only() -> None:
    kernel = kernels_by_hand.gather_and_concat(rows=10_000)
    moved, minimum = moved_and_minimum(kernel, SIZES, l2_bytes=1 << 10)
    assert moved == minimum == 2 * 8 + 40 + 40 + 80


def test_lowered_work_is_the_kernels() -> None:
    lowered = lower(lambda m, x: x.exp() + 1, numbers(2, 3))
    assert lowered.work == kernel_work(lowered.kernel, 2)
    assert (lowered.work.reads, lowered.work.writes, lowered.work.flops) == (24, 24, 6 * (HEAVY["exp"] + 1))
    assert {B, S}.isdisjoint(lowered.work.reads.free_symbols)
