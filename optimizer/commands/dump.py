"""`torchweld dump`: one readable, self-checking file per fused kernel, built for every target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp import print_unit
from torchweld.codegen.dump import CheckResult, DumpResult, KernelDump, check_files, dump_all
from torchweld.codegen.gpu_build import GpuBuild
from torchweld.codegen.ir import Kernel
from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.plan import Launch
from torchweld.codegen.reference import group_reference
from torchweld.graph.target import GPU_TARGETS, gpu_target
from torchweld.optimizer.commands.subject import Job, Wish, explain_subject, load_subject
from torchweld.optimizer.compile import Compiled, group_layers
from torchweld.optimizer.report_tables import Column, Table
from torchweld.optimizer.suggest import check_name

CPU = "cpu"
TARGETS = (*(target.name for target in GPU_TARGETS), CPU)


class DumpError(RuntimeError):
    """A model that has no kernels to write, because it runs eagerly; says why."""


@dataclass(frozen=True)
class Written:
    """Files of a dump, and everything that is wrong with them; empty `problems` mean success."""

    result: DumpResult
    checks: tuple[CheckResult, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """One line per kernel and target that does not fit, and per file whose self-check fails."""
        failed = (f"{check.file.name}: {check.problem}" for check in self.checks if check.problem is not None)
        return (*self.result.problems, *failed)


def parse_targets(text: str) -> tuple[str, ...]:
    """`sm_90,cpu` as names, each once; UnknownNameError for one that does not exist or if there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()] or [text]
    return tuple(dict.fromkeys(check_name("target", name, TARGETS, "--target") for name in names))


def dump_model(
    spec: str, wish: Wish, targets: tuple[str, ...], out: Path, console: Console, *, check: bool
) -> bool:
    """Compile MODEL and write its kernels; True if every kernel builds, fits, and passes the check if wanted.

    Raises DumpError for a model that runs eagerly, OSError where `out` cannot be written.
    """
    # Before the long work, so that a folder that cannot be made is known at once.
    out.mkdir(parents=True, exist_ok=True)
    # Kernels that the gate would not run are written as well: the targets are other machines.
    job = explain_subject(load_subject(spec, wish), wish, gate=False)
    return dump_job(job, targets, out, console, check=check)


def dump_job(job: Job, targets: tuple[str, ...], out: Path, console: Console, *, check: bool = False) -> bool:
    """Write the kernels of a compiled model, print a table of resources, and every problem; True if none."""
    dumps = kernel_dumps(job.compiled, with_cpp=CPU in targets)
    gpus = [gpu_target(name) for name in targets if name != CPU]
    with job.subject.phase("build kernels of"):
        result = dump_all(dumps, out, gpus, job.compiled.hints, cache=Cache())
    checks: list[CheckResult] = []
    if check:
        with job.subject.phase("check kernels of"):
            checks = check_files(result.files)
    written = Written(result, tuple(checks))
    if result.builds:
        console.print(resource_table(result.builds).to_rich())
    checked = f", {len(checks)} self-checks run" if check else ", each checks itself: python FILE"
    summary = f"{len(result.files)} kernels for {', '.join(targets)} in {out}{checked}"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)
    for problem in written.problems:
        console.print(f"! {problem}", markup=False, highlight=False, soft_wrap=True)
    return not written.problems


def kernel_dumps(compiled: Compiled, *, with_cpp: bool) -> list[KernelDump]:
    """Every launch with its kernel, its plain-torch reference and where it is used."""
    if compiled.built is None:
        raise DumpError(f"there are no kernels to write: {compiled.eager_reason}")
    layers = group_layers(compiled.fused)
    references: dict[str, tuple[str, str | None]] = {}
    dumps = []
    for step, number in zip(compiled.built.plan.steps, compiled.built.step_groups, strict=True):
        lowered = compiled.fused.lowered.get(number) if number is not None else None
        if not isinstance(step, Launch) or not isinstance(lowered, LoweredGroup) or number is None:
            continue
        name = step.kernel.name
        if name not in references:
            cpp = cpp_text(step.kernel) if with_cpp else None
            references[name] = group_reference(compiled.fused.groups[number], lowered), cpp
        layer = layers[number]
        use = "outside the layers" if layer is None else f"layer {layer}"
        dumps.append(KernelDump(step.kernel, references[name][0], (use,), references[name][1]))
    return dumps


def cpp_text(kernel: Kernel) -> str:
    """One translation unit with the kernel alone, as the CPU executable would compile it."""
    return print_unit([kernel]).source


def resource_table(builds: tuple[GpuBuild, ...]) -> Table:
    """One line per kernel and target."""
    columns = (
        Column("kernel", "left", wide=True),
        Column("target", "left"),
        *(Column(heading) for heading in ("registers", "spilled", "shared", "threads", "occupancy")),
    )
    title = "Kernels (registers and spilled bytes per thread, shared bytes per block)"
    return Table(title, columns, tuple(_resource_row(build) for build in builds))


def _resource_row(build: GpuBuild) -> tuple[str, ...]:
    used = build.resources
    if used is None:
        return build.kernel, build.target, "", "", "", "", "not built"
    figures = (used.registers, used.spilled_bytes, used.shared_bytes, used.threads)
    return build.kernel, build.target, *(str(figure) for figure in figures), f"{build.occupancy:.0%}"
