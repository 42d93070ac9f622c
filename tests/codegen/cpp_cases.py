"""Ways to run one kernel through the C++ printer, shared by the tests of the printer and of the executable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from sympy import Integer
from torch import Tensor

from torchweld.codegen.executable import Executable
from torchweld.codegen.ir import Buffer, Kernel, RowPart, Store
from torchweld.codegen.plan import Launch, Plan, ValueSpec
from torchweld.graph.index import evaluate
from torchweld.graph.terms import Axis, Load, Term


def plan_of(kernel: Kernel) -> Plan:
    """A plan of one launch: the kernel's inputs and weights are the plan's inputs."""
    specs = {b.name: ValueSpec(b.name, b.dtype, b.shape) for b in kernel.buffers}
    outputs = tuple(b.name for b in kernel.buffers if b.role == "output")
    inputs = tuple(specs[b.name] for b in kernel.buffers if b.role != "output")
    launch = Launch(kernel, tuple(b.name for b in kernel.buffers))
    return Plan(inputs, {}, {name: specs[name] for name in outputs}, (launch,), outputs, kernel.sizes)


def run(kernel: Kernel, buffers: Mapping[str, Tensor], threads: int = 1) -> dict[str, Tensor]:
    """The kernel's outputs by name."""
    plan = plan_of(kernel)
    results = Executable(plan, threads=threads)(*(buffers[spec.name] for spec in plan.inputs))
    return dict(zip(plan.outputs, results, strict=True))


def quantized(format_name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random rows in a stored format: uint8 [rows, row_bytes], every bit pattern of the quants possible."""
    rng = np.random.default_rng(seed)
    kind = GGMLQuantizationType[format_name]
    try:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        return torch.from_numpy(quants.quantize(values, kind).view(np.uint8).copy())
    except NotImplementedError:  # gguf cannot make K-quants: random bytes with finite scales
        return _random_blocks(format_name, rows, columns, rng)


def _random_blocks(format_name: str, rows: int, columns: int, rng: np.random.Generator) -> Tensor:
    size, scales = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}[format_name]
    blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    for at in scales:
        halves = (rng.standard_normal((rows, columns // 256, 1)) * 0.01).astype(np.float16)
        blocks[..., at : at + 2] = halves.view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def dequantized(format_name: str, data: Tensor) -> Tensor:
    """What gguf reads out of the rows: float32."""
    return torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[format_name]).copy())


def random_buffers(kernel: Kernel, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Inputs and weights of the kernel; integers are legal indices of the smallest table, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    buffers = {}
    limit = min((evaluate(i.extent, sizes) for i in kernel.indirects), default=11)
    for buffer in kernel.buffers:
        shape = [evaluate(extent, sizes) for extent in buffer.shape]
        if buffer.role == "output":
            continue
        if buffer.format:
            columns = (
                {"Q8_0": 32, "Q4_1": 32}[buffer.format] * shape[-1] // {"Q8_0": 34, "Q4_1": 20}[buffer.format]
            )
            buffers[buffer.name] = quantized(buffer.format, prod(shape[:-1]), columns, seed)
        elif buffer.dtype == torch.int64:
            buffers[buffer.name] = torch.randint(-limit, limit, shape, generator=generator)
        elif buffer.dtype == torch.bool:
            buffers[buffer.name] = torch.rand(shape, generator=generator) > 0.3
        else:
            buffers[buffer.name] = torch.randn(shape, generator=generator).to(buffer.dtype)
    return buffers


def pointwise(
    make: Callable[[Sequence[Term]], Term], inputs: Sequence[torch.dtype], output: torch.dtype, count: int
) -> Kernel:
    """y[i] = make(x0[i], x1[i], ...)."""
    i, n = Axis("i", Integer(count)), Integer(count)
    terms = [Load(dtype, f"x{number}", (i.symbol,)) for number, dtype in enumerate(inputs)]
    part = RowPart((), (i,), (), (Store("y", (i.symbol,), make(terms)),))
    loads = [Buffer(f"x{number}", dtype, (n,), "input") for number, dtype in enumerate(inputs)]
    return Kernel("pointwise", (*loads, Buffer("y", output, (n,), "output")), (), (part,))


@functools.cache
def specials(dtype: torch.dtype) -> Tensor:
    """Where functions break: zeros, subnormals, ties, the ends of the range, infinities, NaN; and many others."""
    tie = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        1 + 3 * 2**-11,
        65519.0,
        65520.0,
        2**-24,
        2**-25,
    ]
    ends = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1e-45,
        -1e-45,
        1e-38,
        3.4e38,
        -3.4e38,
        88.0,
        88.8,
        -87.5,
        -103.0,
        -104.5,
        9.0,
        -9.0,
    ]
    rest = [
        float("inf"),
        float("-inf"),
        float("nan"),
        1e-5,
        -1e-5,
        0.625,
        0.6249999,
        0.927734375,
        7.0,
        -3.0,
        1e10,
    ]
    generator = torch.Generator().manual_seed(1)
    many = torch.randn(400, generator=generator) * 4
    wide = torch.randn(200, generator=generator) * 40
    return torch.cat((torch.tensor(tie + ends + rest), many, wide)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True
    )
