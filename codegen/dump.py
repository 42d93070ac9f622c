"""Dump fused kernels: a self-checking Python file each, C++ beside it, binaries and a table of what they use.

    DIR/rmsnorm_gated_linear.py             Triton, its plain-torch reference, check(), benchmark()
    DIR/rmsnorm_gated_linear.cpp            the same kernel for the CPU
    DIR/rmsnorm_gated_linear.sm_90.ptx      assembly and binary per target (.ptx/.cubin, .amdgcn/.hsaco)
    DIR/resources.md, resources.json        registers, spills, shared memory, occupancy of all kernels and targets

A kernel that spills is printed again with smaller tiles, so that one text serves all targets; one that still spills,
or that a target cannot run, is a problem that the caller must report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torchweld.codegen.cache import Cache
from torchweld.codegen.dump_text import kernel_file
from torchweld.codegen.gpu_build import GpuBuild, build_for_gpus
from torchweld.codegen.ir import Kernel
from torchweld.codegen.triton import TritonKernel, build_triton
from torchweld.codegen.triton_best import search_refusal
from torchweld.codegen.triton_schedule import MAX_SHRINK
from torchweld.graph.target import GpuTarget

_SUFFIXES = {"cuda": (".ptx", ".cubin"), "hip": (".amdgcn", ".hsaco")}


@dataclass(frozen=True)
class KernelDump:
    """What is to be written of one kernel.

    reference: source of `reference(inputs..., sizes...)`, parameters in the order of the kernel's buffers and sizes
    (codegen/reference.py writes it).  uses: where the kernel is launched, in words.  cpp_source: the C++ text.
    check_sizes: sizes for the self-check where small ones do not do.
    """

    kernel: Kernel
    reference: str
    uses: tuple[str, ...] = ()
    cpp_source: str | None = None
    check_sizes: Mapping[str, int] | None = None


@dataclass(frozen=True)
class DumpResult:
    """What was written, and what is wrong: one line per kernel and target that failed to build."""

    files: tuple[Path, ...]
    builds: tuple[GpuBuild, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class CheckResult:
    """The self-check of one file: its error over the tolerance, or what went wrong."""

    file: Path
    error: float | None
    problem: str | None


def dump_kernel(
    kernel: Kernel, reference: str, out: Path, targets: Sequence[GpuTarget], cpp_source: str | None,
    example_sizes: Mapping[str, int],
) -> DumpResult:  # fmt: skip
    """`dump_all` for one kernel."""
    return dump_all([KernelDump(kernel, reference, cpp_source=cpp_source)], out, targets, example_sizes)


def dump_all(
    dumps: Sequence[KernelDump],
    out: Path,
    targets: Sequence[GpuTarget],
    example_sizes: Mapping[str, int],
    workers: int = 2,
    cache: Cache | None = None,
) -> DumpResult:
    """Write every kernel to `out` (made if missing) and build it for `targets`.

    example_sizes: values of all size symbols, for bytes, operations and the benchmark.  Entries with the same kernel
    are written once, with all their uses.  Raises ValueError for two different kernels of one name, KeyError for a
    size without a value, OSError where `out` cannot be written.
    """
    everything = _merge(dumps)
    refusals = {entry.kernel.name: _refusal(entry.kernel) for entry in everything}
    entries = [entry for entry in everything if refusals[entry.kernel.name] is None]
    printed, builds = fit_kernels([entry.kernel for entry in entries], targets, workers, cache)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for entry, text in zip(entries, printed, strict=True):
        path = out / f"{entry.kernel.name}.py"
        source = kernel_file(
            entry.kernel, text, entry.reference, example_sizes, targets, entry.uses, entry.check_sizes
        )
        path.write_text(source, encoding="utf-8")
        files.append(path)
    for entry in everything:
        if entry.cpp_source is not None:
            (out / f"{entry.kernel.name}.cpp").write_text(entry.cpp_source, encoding="utf-8")
    backends = {target.name: target.backend for target in targets}
    for build in builds:
        if build.binary:
            text_suffix, binary_suffix = _SUFFIXES[backends[build.target]]
            stem = out / f"{build.kernel}.{build.target}"
            Path(f"{stem}{text_suffix}").write_text(build.assembly, encoding="utf-8")
            Path(f"{stem}{binary_suffix}").write_bytes(build.binary)
    _write_resources(out, builds)
    problems = tuple(f"{b.kernel} for {b.target}: {b.problem}" for b in builds if b.problem is not None)
    problems += tuple(f"{name}: {reason}" for name, reason in refusals.items() if reason is not None)
    return DumpResult(tuple(files), tuple(builds), problems)


def _refusal(kernel: Kernel) -> str | None:
    """Why there is no Triton of a kernel; its C++ is written all the same."""
    return next((reason for part in kernel.parts if (reason := search_refusal(part)) is not None), None)


def _merge(dumps: Sequence[KernelDump]) -> list[KernelDump]:
    """One entry per kernel, in order of first use."""
    merged: dict[str, KernelDump] = {}
    for entry in dumps:
        name = entry.kernel.name
        if name not in merged:
            merged[name] = entry
            continue
        first = merged[name]
        if first.kernel is not entry.kernel and first.kernel != entry.kernel:
            raise ValueError(
                f"two different kernels are called {name!r}: give every kernel a name of its own"
            )
        merged[name] = KernelDump(
            first.kernel, first.reference, first.uses + entry.uses, first.cpp_source, first.check_sizes
        )
    return list(merged.values())


def fit_kernels(
    kernels: Sequence[Kernel], targets: Sequence[GpuTarget], workers: int = 2, cache: Cache | None = None
) -> tuple[list[TritonKernel], list[GpuBuild]]:
    """Print and build kernels; those that spill or do not fit a target are printed again with smaller tiles."""
    printed = [build_triton(kernel) for kernel in kernels]
    if not targets:
        return printed, []
    width = len(targets)
    flat = build_for_gpus(printed, targets, workers, cache)
    builds = [flat[i * width : (i + 1) * width] for i in range(len(kernels))]
    for shrink in range(1, MAX_SHRINK + 1):
        tight = [i for i, row in enumerate(builds) if any(build.has_spilled for build in row)]
        if not tight:
            break
        smaller = [build_triton(kernels[i], shrink) for i in tight]
        flat = build_for_gpus(smaller, targets, workers, cache)
        for place, i in enumerate(tight):
            printed[i], builds[i] = smaller[place], flat[place * width : (place + 1) * width]
    names = [kernel.name for kernel in kernels]
    return printed, [_named(build, name) for name, row in zip(names, builds, strict=True) for build in row]


def _named(build: GpuBuild, name: str) -> GpuBuild:
    return GpuBuild(
        name, build.target, build.assembly, build.binary, build.resources, build.occupancy, build.problem
    )


# -- the table ------------------------------------------------------------------------------------------------


def _write_resources(out: Path, builds: Sequence[GpuBuild]) -> None:
    """resources.md for people, resources.json for programs."""
    rows = [_row(build) for build in builds]
    (out / "resources.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    columns = (
        "kernel",
        "target",
        "registers",
        "spilled_bytes",
        "shared_bytes",
        "threads",
        "occupancy",
        "problem",
    )
    lines = ["# Resources of the GPU kernels", "",
             "Registers and spilled bytes per thread, shared memory per block; occupancy is the share of a",
             "multiprocessor's warps that can be resident.", "",
             "| " + " | ".join(columns).replace("_", " ") + " |", "|" + "---|" * len(columns)]  # fmt: skip
    for row in rows:
        cells = ["" if row[column] is None else str(row[column]) for column in columns]
        lines.append(
            "| " + " | ".join(cell.replace("|", "/").replace("\n", " ")[:120] for cell in cells) + " |"
        )
    (out / "resources.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(build: GpuBuild) -> dict[str, str | int | float | None]:
    used = build.resources
    return {
        "kernel": build.kernel,
        "target": build.target,
        "registers": used.registers if used else None,
        "spilled_bytes": used.spilled_bytes if used else None,
        "shared_bytes": used.shared_bytes if used else None,
        "threads": used.threads if used else None,
        "occupancy": round(build.occupancy, 3) if used else None,
        "sha256": build.digest if build.binary else None,
        "problem": build.problem,
    }


# -- self-checks ----------------------------------------------------------------------------------------------


def check_files(files: Sequence[Path], workers: int = 2, seconds: float = 600.0) -> list[CheckResult]:
    """Run the self-checks of dumped files in `workers` processes of their own, each stopped after `seconds`."""
    workers = max(1, min(workers, len(files)))
    chunks = [list(files[w::workers]) for w in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        found = [
            result for results in pool.map(lambda c: _check_chunk(c, seconds), chunks) for result in results
        ]
    order = {file: position for position, file in enumerate(files)}
    return sorted(found, key=lambda result: order[result.file])


def _check_chunk(files: Sequence[Path], seconds: float) -> list[CheckResult]:
    if not files:
        return []
    command = [sys.executable, "-P", "-m", "torchweld.codegen.check_worker", *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        output, why = done.stdout, f"the process ended with code {done.returncode}: {done.stderr[-300:]}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        why = f"stopped after {seconds:.0f} seconds"
    results = {}
    for line in output.splitlines():
        answer = json.loads(line)
        results[answer["file"]] = CheckResult(Path(answer["file"]), answer["error"], answer["problem"])
    return [results.get(str(file), CheckResult(file, None, why)) for file in files]
