"""The text of a dumped kernel's file: docstring, kernel, launcher, reference and self-check in one template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, permutations
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from torchweld.codegen.formula import formula
from torchweld.codegen.ir import Buffer, Kernel, part_axes, part_terms
from torchweld.codegen.triton import TritonKernel
from torchweld.codegen.triton_text import Value, index_text
from torchweld.codegen.work import kernel_work
from torchweld.graph.cost import roofline_microseconds
from torchweld.graph.formats import get_format
from torchweld.graph.index import Mod, evaluate
from torchweld.graph.target import GpuTarget
from torchweld.graph.terms import Attend, Expr, IndexValue, Load, walk

INTERPRETED_PROGRAMS = 128
_PAST = 5  # integers that index nothing are below it
# 5 * 6 rows are just below one matmul tile of 32; fewer keys than 5 could all be masked by chance.
_CHECKED = ((5, 6, 7, 3, 11, 13), (17, 19, 23, 29, 31, 37), (64, 128, 192, 256, 320, 384))


def kernel_file(
    kernel: Kernel,
    printed: TritonKernel,
    reference: str,
    sizes: Mapping[str, int],
    targets: Sequence[GpuTarget],
    uses: Sequence[str] = (),
    checked: Mapping[str, int] | None = None,
) -> str:
    """The whole file: Python source that imports torch and triton only and checks itself when it is run.

    sizes: where bytes, operations and the benchmark are taken; checked: sizes of the self-check (None: small ones).
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    check_sizes = check_sizes_of(kernel) if checked is None else {n: checked[n] for n in kernel.sizes}
    return environment.get_template("kernel_file.py.j2").render(
        docstring=docstring(kernel, sizes, targets, uses).replace("\\", "/").replace('"""', "'''"),
        name=kernel.name,
        source=printed.source.rstrip("\n"),
        launcher=printed.launcher.rstrip("\n"),
        reference=reference.strip("\n"),
        inputs=[_make_input(b, kernel) for b in kernel.buffers if b.role != "output"],
        updated=any(b.role == "update" for b in kernel.buffers),
        input_names=repr(tuple(b.name for b in kernel.buffers if b.role != "output")),
        result_names=repr(tuple(b.name for b in kernel.buffers if b.is_written)),
        parameters_sizes="".join(f"{name}, " for name in kernel.sizes),
        check_sizes=repr(check_sizes),
        benchmark_sizes=repr({name: sizes[name] for name in kernel.sizes}),
        tolerance=repr(tolerance(kernel)),
        interpreted_programs=INTERPRETED_PROGRAMS,
    )


def check_sizes_of(kernel: Kernel) -> dict[str, int]:
    """Small sizes, different from each other, at which no buffer has a negative extent."""
    for numbers in chain(_CHECKED, permutations(_CHECKED[-1])):
        sizes = {name: numbers[i % len(numbers)] for i, name in enumerate(kernel.sizes)}
        if all(
            evaluate(extent, sizes) > 0 for b in kernel.buffers for extent in b.shape if extent.free_symbols
        ) and all(evaluate(room, sizes) >= 0 for room in _cache_room(kernel)):
            return sizes
    raise ValueError(f"kernel {kernel.name}: no sizes found for its self-check; give some")


def _cache_room(kernel: Kernel) -> Iterator[Expr]:
    """What must not be negative for all rows of a call to fit in its caches, with up to `_PAST` rows before them."""
    terms = {indirect.symbol: indirect.term for indirect in kernel.indirects}
    for part in kernel.parts:
        for term in part_terms(part):
            if isinstance(term, Attend) and term.past is not None:
                seen = term.window if term.mask_kind == "window" else _PAST
                yield term.s.extent - term.t_extent - seen
        extents = {axis.symbol: axis.extent for axis in part_axes(part)}
        for store in part.stores:
            if kernel.buffer(store.buffer).role == "update":
                for term in walk(terms[str(store.index[2])]):
                    row = term.expr if isinstance(term, IndexValue) else None
                    rows = row.args[1] if isinstance(row, Mod) else extents.get(row)
                    if rows is not None:
                        yield kernel.buffer(store.buffer).shape[2] - rows


def tolerance(kernel: Kernel) -> float:
    """Allowed error relative to a row's largest magnitude; 16-bit references round between operations."""
    dtypes = {b.dtype for b in kernel.buffers}
    if torch.bfloat16 in dtypes:
        return 2.0**-5
    return 2.0**-8 if torch.float16 in dtypes else 2.0**-14


def docstring(
    kernel: Kernel, sizes: Mapping[str, int], targets: Sequence[GpuTarget], uses: Sequence[str]
) -> str:
    """What the kernel does, where it comes from, and what it costs."""
    lines = [
        f"{kernel.name}: {', '.join(dict.fromkeys(_operation(o) for o in kernel.ops)) or 'a fused kernel'}.",
        "",
    ]
    lines += formula(kernel)
    lines += ["", "buffers:", *(f"    {_describe(b)}" for b in kernel.buffers)]
    if kernel.sources:
        lines += ["", "from:", *(f"    {source}" for source in kernel.sources)]
    if uses:
        lines += ["", f"used by {len(uses)}:", *(f"    {use}" for use in uses)]
    lines += ["", *cost_lines(kernel, sizes, targets), ""]
    return "\n".join(line[:400].rstrip() for line in lines)


def _operation(name: str) -> str:
    return name.removeprefix("aten.").removesuffix(".default")


def cost_lines(kernel: Kernel, sizes: Mapping[str, int], targets: Sequence[GpuTarget]) -> list[str]:
    """Bytes, operations and the modelled time per target."""
    work = kernel_work(kernel, 1)
    values = {name: sizes[name] for name in kernel.sizes}
    nbytes = evaluate(work.reads, values) + evaluate(work.writes, values)
    flops = evaluate(work.flops, values)
    at = ", ".join(f"{name} = {value}" for name, value in values.items()) or "fixed sizes"
    lines = [
        f"cost at {at}:",
        f"    bytes {nbytes:,} (reads {work.reads}, writes {work.writes})",
        f"    operations {flops:,}",
    ]
    for target in targets:
        ceilings = target.ceilings()
        time = roofline_microseconds(nbytes, flops, ceilings)
        is_memory = nbytes / ceilings.read_gb_s > flops / ceilings.f32_gflops
        bound = "memory" if is_memory else "arithmetic"
        lines.append(
            f"    roofline {target.name} ({target.chip}): {time:.2f} us with the launch, bound by {bound}"
        )
    return lines


def _describe(buffer: Buffer) -> str:
    shape = ", ".join(map(str, buffer.shape))
    stored = f", stored as {buffer.format}" if buffer.format else ""
    return f"{buffer.name}: {str(buffer.dtype).removeprefix('torch.')} [{shape}], {buffer.role}{stored}"


# -- random inputs --------------------------------------------------------------------------------------------


def _make_input(buffer: Buffer, kernel: Kernel) -> str:
    """The expression that makes one random input."""
    shape = "[" + ", ".join(_text(extent) for extent in buffer.shape) + "]"
    if buffer.format is not None:
        stored = get_format(buffer.format)
        if stored.scales:
            return f"stored_weight({shape}, {stored.block_bytes}, {stored.scales}, generator)"
        dense = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}[buffer.format]
        columns = (
            "["
            + ", ".join([*map(_text, buffer.shape[:-1]), _text(buffer.shape[-1] / stored.block_bytes)])
            + "]"
        )
        return f"torch.randn({columns}, generator=generator).to({dense}).view(torch.uint8)"
    if buffer.dtype == torch.bool:
        return f"torch.rand({shape}, generator=generator) > 0.3"
    if buffer.dtype.is_floating_point:
        return f"torch.randn({shape}, generator=generator).to({buffer.dtype})"
    return (
        f"torch.randint(0, {_integer_limit(buffer, kernel)}, {shape}, generator=generator).to({buffer.dtype})"
    )


def _integer_limit(buffer: Buffer, kernel: Kernel) -> str:
    """Integers that index something stay in the lower half of what they index: offsets may be added to them."""
    limits: dict[str, None] = {}
    for indirect in kernel.indirects:
        read = {t.buffer for t in walk(indirect.term) if isinstance(t, Load)}
        if buffer.name in read:  # an index made of several buffers may be their product
            extent = _text(indirect.extent)
            limits[f"({extent}) // 2" if len(read) == 1 else f"math.isqrt({extent}) // 2"] = None
    if not limits:
        return "5"
    least = next(iter(limits)) if len(limits) == 1 else f"min({', '.join(limits)})"
    return f"max(1, {least})"


def _text(expr: Expr) -> str:
    return index_text(expr, lambda symbol: Value(str(symbol))).text
