"""Matmuls with packed weights against a plain read of the same bytes, per format and number of rows.

    python -m benchmarks.kernels [--formats Q8_0,Q5_0] [--precision f32,int8,bf16] [--rows 1,4,256] [--columns 8192]

int8 and bf16 include the conversion of the rows. One thread; every figure is the least time of many short repetitions,
and the read loop runs between them, so that both meet the same machine. `read` is the share of the read loop's speed
that the kernel reaches (its own bytes).
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence

import torch

from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp import FLAGS, prelude
from torchweld.codegen.packing import STORED, Packing, huge_pages, shared_packer
from torchweld.codegen.toolchain import compile_shared, load
from torchweld.graph.formats import get_format

_DENSE = ("F32", "F16", "BF16")
_BUDGET = 0.4  # seconds per figure

_READ = """
extern "C" float read_all(const uint8_t* p, int64_t bytes) {
    tw_i16 sum[8] = {};
    for (int64_t at = 0; at + 512 <= bytes; at += 512)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            __builtin_prefetch(p + at + 64 * i + 4096);
            sum[i] ^= (tw_i16)tw_words(p + at + 64 * i);
        }
    tw_i16 all = {};
    for (int i = 0; i < 8; ++i) all ^= sum[i];
    return (float)all[0];
}
"""
_MATMUL = """
extern "C" void f32_%(f)s(const float* a, int64_t stride, int64_t rows, const float* a_sums, const uint8_t* base,
                             int64_t columns, int64_t steps, float* out) {
    alignas(64) float tile[64 * 64];
    for (int64_t r = 0; r < rows; r += 64)
        for (int64_t c = 0; c < columns; c += 64) {
            const int64_t count = tw_least<int64_t>(64, rows - r), width = tw_least<int64_t>(64, columns - c);
            tw_packed_matmul<tw_R16_%(f)s>(a + r * stride, stride, count, a_sums + r * (stride / 32),
                                          base + c / 16 * tw_group_bytes<tw_R16_%(f)s>(steps), width, steps, tile, 64);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < width; ++j) out[(r + i) * columns + c + j] = tile[i * 64 + j];
        }
}
extern "C" void bf16_%(f)s(const float* a, int64_t stride, int64_t rows, const float*, const uint8_t* base,
                           int64_t columns, int64_t steps, float* out) {
    alignas(64) static float tile[256 * 64];
    alignas(64) static uint16_t half[256 * 8192];
    alignas(64) static uint8_t room[4 * 256 * 1024];
    for (int64_t r = 0; r < rows; r += 256) {
        const int64_t count = tw_least<int64_t>(256, rows - r);
        for (int64_t i = 0; i < count; ++i) tw_round_row(a + (r + i) * stride, stride, i, half);
        for (int64_t c = 0; c < columns; c += 64) {
            const int64_t width = tw_least<int64_t>(64, columns - c);
            const uint8_t* const w = tw_bf16_weights<tw_R16_%(f)s>(
                base + c / 16 * tw_group_bytes<tw_R16_%(f)s>(steps), width, steps, room);
            tw_tiles_on();
            tw_bf16_matmul(half, stride, count, w, width, steps, tile, 64);
            tw_tiles_off();
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < width; ++j) out[(r + i) * columns + c + j] = tile[i * 64 + j];
        }
    }
}
"""
_INT8 = """
extern "C" void int8_%(f)s(const float* a, int64_t stride, int64_t rows, const float*, const uint8_t* base,
                           int64_t columns, int64_t steps, float* out) {
    alignas(64) static float tile[64 * 64];
    alignas(64) static int8_t codes[64 * 8192];
    alignas(64) static float scales[64 * 256], offsets[64 * 256];
    alignas(64) static int32_t sums[64 * 512];
    for (int64_t r = 0; r < rows; r += 64) {
        const int64_t count = tw_least<int64_t>(64, rows - r);
        for (int64_t i = 0; i < count; ++i)
            tw_quantize_row(a + (r + i) * stride, stride, i, codes, scales, offsets, sums);
        for (int64_t c = 0; c < columns; c += 64) {
            const int64_t width = tw_least<int64_t>(64, columns - c);
            tw_packed_int8<tw_R16_%(f)s>(codes, count, scales, offsets, sums,
                                        base + c / 16 * tw_group_bytes<tw_R16_%(f)s>(steps), width, steps, tile, 64);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < width; ++j) out[(r + i) * columns + c + j] = tile[i * 64 + j];
        }
    }
}
"""


def least_seconds(run: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """The least times of `run` and `other`, alternating."""
    best = [float("inf"), float("inf")]
    end = time.perf_counter() + _BUDGET
    while time.perf_counter() < end:
        for number, function in enumerate((run, other)):
            begin = time.perf_counter()
            function()
            best[number] = min(best[number], time.perf_counter() - begin)
    return best[0], best[1]


def library(formats: Sequence[str], cache: Cache) -> ctypes.CDLL:
    """The kernels of `formats` and the read loop."""
    matmuls = [_MATMUL % {"f": name} for name in formats]
    matmuls += [_INT8 % {"f": name} for name in formats if name not in _DENSE]
    source = "\n".join([prelude(), _READ, *matmuls])
    path = compile_shared(source, cache=cache, flags=FLAGS, name="benchmark")
    loaded = load(path)
    loaded.read_all.restype = ctypes.c_float
    return loaded


def random_weight(name: str, rows: int, depth: int) -> torch.Tensor:
    """Random bytes of a stored format with small finite scales: uint8 [rows, row_bytes]."""
    stored = get_format(name)
    data = torch.randint(0, 256, (rows, stored.row_bytes(depth)), dtype=torch.uint8)
    if name in _DENSE:
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        return torch.randn(rows, depth).to(kind).view(torch.uint8)
    blocks = data.view(rows, -1, stored.block_bytes)
    for at in stored.scales:
        blocks[..., at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return data


def measure(
    name: str,
    precision: str,
    rows: Sequence[int],
    columns: int,
    depth: int,
    loaded: ctypes.CDLL,
    cache: Cache,
) -> list[str]:
    """Lines of the table for one format and precision."""
    packer = shared_packer(cache)
    weight = random_weight(name, columns, depth)
    (packed,) = packer.pack([Packing(weight, name)], threads=1)
    room = huge_pages(packed.numel() + 8192)
    room[: packed.numel()] = packed
    number, address = ctypes.c_int64, ctypes.c_void_p
    stride = -(-depth // 32) * 32
    reference = get_format(name).decode_rows(weight, depth).double()
    lines = []
    for count in rows:
        a = torch.zeros(count, stride)
        a[:, :depth] = torch.randn(count, depth)
        sums = a.view(count, -1, 32).sum(-1).contiguous()
        out = torch.empty(count, columns)
        matmul = getattr(loaded, f"{precision}_{name}")
        arguments = (
            address(a.data_ptr()), number(stride), number(count), address(sums.data_ptr()), address(room.data_ptr()),
            number(columns), number(stride // 32), address(out.data_ptr()),
        )  # fmt: skip
        read = (address(room.data_ptr()), number(packed.numel()))
        ours, plain = least_seconds(lambda: matmul(*arguments), lambda: loaded.read_all(*read))  # noqa: B023
        want = a[:, :depth].double() @ reference.T
        error = float((out.double() - want).abs().max() / want.abs().max())
        gigabytes, flops = packed.numel() / ours / 1e9, 2 * count * columns * depth / ours / 1e9
        lines.append(
            f"| {name} | {precision} | {count} | {ours * 1e6:.0f} | {gigabytes:.1f} | {plain / ours:.0%} |"
            f" {packed.numel() / plain / 1e9:.1f} | {flops:.0f} | {error:.1e} |"
        )
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(STORED))
    parser.add_argument("--precision", default="f32,int8,bf16")
    parser.add_argument("--rows", default="1,2,4,8,64")
    parser.add_argument("--columns", type=int, default=32768)
    parser.add_argument("--depth", type=int, default=1024)
    options = parser.parse_args()
    formats = options.formats.split(",")
    cache = Cache()
    loaded = library(formats, cache)
    print(
        "| format | precision | rows | us | GB/s | read | read GB/s | GFLOP/s | error |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for name in formats:
        rows = [int(count) for count in options.rows.split(",")]
        for precision in options.precision.split(","):
            if precision != "int8" or name not in _DENSE:
                lines = measure(name, precision, rows, options.columns, options.depth, loaded, cache)
                print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
