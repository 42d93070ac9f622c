"""Compile Triton kernels for GPUs that this machine does not have, and count what they use.

Every kernel is compiled by Triton's own compiler for an architecture given by name; registers and spills come from
the binary (`cuobjdump -res-usage`, shipped with Triton) or from the metadata in the assembly (AMD), occupancy from
the published limits of the target.  A kernel that spills, or that does not fit the target, has a `problem`.

Built kernels are kept in our own cache, which verifies every byte; Triton's cache is a private folder that is thrown
away, because it returns damaged files as good.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torchweld.codegen.cache import Cache, JsonValue, make_key
from torchweld.codegen.private_folder import private_scratch
from torchweld.codegen.triton import TritonKernel
from torchweld.graph.target import GpuTarget

HEADER: Final = "import triton\nimport triton.language as tl\n\n\n"
_MACHINES: Final[Mapping[str, int]] = {"cuda": 190, "hip": 224}  # ELF e_machine: EM_CUDA, EM_AMDGPU
_SECONDS_PER_JOB: Final = 120.0


class GpuBuildError(RuntimeError):
    """The compiler failed, crashed or gave something that is not a binary for the target."""


@dataclass(frozen=True)
class Resources:
    """What one thread block of a compiled kernel takes: registers and spilled bytes per thread, shared bytes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int


@dataclass(frozen=True)
class GpuBuild:
    """One kernel compiled for one target, or the reason why not.

    problem: None, or what is wrong in words (compiler error, spills, a limit of the target exceeded).
    occupancy: resident warps over the most that fit on a multiprocessor, 0 to 1.
    """

    kernel: str
    target: str
    assembly: str
    binary: bytes
    resources: Resources | None
    occupancy: float
    problem: str | None

    @property
    def digest(self) -> str:
        """SHA-256 of the binary."""
        return hashlib.sha256(self.binary).hexdigest()

    @property
    def has_spilled(self) -> bool:
        """Whether registers went to memory, or more was asked for than the target has."""
        return self.problem is not None and self.resources is not None


@dataclass(frozen=True)
class _Job:
    """One kernel for one target."""

    kernel: TritonKernel
    target: GpuTarget

    @property
    def key(self) -> str:
        """The cache key: everything that the result depends on."""
        version = importlib.metadata.version("triton")
        kernel = self.kernel
        options = json.dumps([kernel.entry, kernel.signature, kernel.warps, kernel.stages, kernel.dot_dtype])
        return make_key("triton", version, kernel.source, options, self.target.name)

    def request(self, number: int, folder: Path) -> dict[str, JsonValue]:
        """The worker's job description; writes the module that the worker loads."""
        module = folder / f"kernel_{hashlib.sha256(self.kernel.source.encode()).hexdigest()[:16]}.py"
        if not module.exists():
            module.write_text(HEADER + self.kernel.source, encoding="utf-8")
        is_cuda = self.target.backend == "cuda"
        return {
            "id": number,
            "module": str(module),
            "entry": self.kernel.entry,
            "signature": dict(self.kernel.signature),
            "constexprs": {"DOT_DTYPE": self.kernel.dot_dtype} if self.kernel.dot_dtype else {},
            # Every pointer that torch or our loader hands out is aligned to 16 bytes.
            "aligned": [name for name, kind in self.kernel.signature.items() if kind.startswith("*")],
            "backend": self.target.backend,
            "arch": int(self.target.name.removeprefix("sm_")) if is_cuda else self.target.name,
            "warp_size": self.target.warp_size,
            "warps": self.kernel.warps,
            "stages": self.kernel.stages,
        }


def build_for_gpus(
    kernels: Sequence[TritonKernel],
    targets: Sequence[GpuTarget],
    workers: int = 2,
    cache: Cache | None = None,
) -> list[GpuBuild]:
    """Compile every kernel for every target, kernel by kernel; what fails comes back with its `problem`.

    workers: compiler processes at a time.  cache: where finished builds are looked up and kept (None: nowhere).
    """
    jobs = [_Job(kernel, target) for kernel in kernels for target in targets]
    answers: dict[int, dict[str, JsonValue]] = {}
    if cache is not None:
        for number, job in enumerate(jobs):
            if isinstance(found := cache.get_json(job.key), dict):
                answers[number] = found
    missing = [number for number in range(len(jobs)) if number not in answers]
    for number, answer in _compile(jobs, missing, workers):
        answers[number] = answer
        if cache is not None and "error" not in answer:
            cache.put_json(jobs[number].key, answer, {"kind": "gpu", "target": jobs[number].target.name})
    return [_finish(job, answers[number]) for number, job in enumerate(jobs)]


# -- compiler processes ---------------------------------------------------------------------------------------


def _compile(
    jobs: Sequence[_Job], numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[str, JsonValue]]]:
    """Run the compiler over `numbers`, spread over processes; one answer for each."""
    if not numbers:
        return
    workers = max(1, min(workers, len(numbers)))
    with private_scratch() as folder, ThreadPoolExecutor(workers) as pool:
        requests = [[jobs[n].request(n, folder) for n in numbers[w::workers]] for w in range(workers)]
        for answers in pool.map(_run_worker, requests, [folder / f"triton{w}" for w in range(workers)]):
            yield from answers


def _run_worker(requests: list[dict[str, JsonValue]], cache: Path) -> list[tuple[int, dict[str, JsonValue]]]:
    """Answers to all requests; a compiler that dies or hangs costs the job it died of, the rest goes on."""
    done: list[tuple[int, dict[str, JsonValue]]] = []
    while len(done) < len(requests):
        rest = requests[len(done) :]
        answers, why = _run_process(rest, cache)
        done += answers
        if len(answers) < len(rest):
            failed = rest[len(answers)]
            done.append((int(str(failed["id"])), {"error": f"the compiler {why}"}))
    return done


def _run_process(
    requests: list[dict[str, JsonValue]], cache: Path
) -> tuple[list[tuple[int, dict[str, JsonValue]]], str]:
    """One compiler process; the answers that it gave, in order, and how it ended."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", "-m", "torchweld.codegen.gpu_worker"]
    answers: list[tuple[int, dict[str, JsonValue]]] = []
    with subprocess.Popen(
        command, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        alarm = threading.Timer(_SECONDS_PER_JOB * len(requests), process.kill)
        alarm.start()
        try:
            output, _ = process.communicate(json.dumps(requests))
        finally:
            alarm.cancel()
    for line in output.splitlines():
        answer = json.loads(line)
        answers.append((answer.pop("id"), answer))
    return answers, f"ended with code {process.returncode} and no answer"


# -- reading what came back -----------------------------------------------------------------------------------


def _finish(job: _Job, answer: Mapping[str, JsonValue]) -> GpuBuild:
    """The compiler's answer checked and measured."""
    name, target = job.kernel.entry, job.target
    try:
        if "error" in answer:
            raise GpuBuildError(str(answer["error"]))
        assembly, binary = str(answer["assembly"]), base64.b64decode(str(answer["binary"]))
        check_elf(binary, target)
        resources = _resources(job, assembly, binary, int(str(answer["shared"])))
    except GpuBuildError as error:
        return GpuBuild(name, target.name, "", b"", None, 0.0, str(error))
    problem = target.exceeded(resources.registers, resources.shared_bytes, resources.threads)
    if resources.spilled_bytes:
        problem = f"spills {resources.spilled_bytes} bytes per thread"
    occupancy = target.occupancy(resources.registers, resources.shared_bytes, resources.threads)
    return GpuBuild(name, target.name, assembly, binary, resources, occupancy, problem)


def check_elf(binary: bytes, target: GpuTarget) -> None:
    """Raise GpuBuildError unless `binary` is a whole ELF file for the target's kind of GPU."""
    if len(binary) < 64 or binary[:4] != b"\x7fELF" or binary[4] != 2:
        raise GpuBuildError(
            f"{target.name}: the compiler's output of {len(binary)} bytes is no 64-bit ELF file"
        )
    machine = int.from_bytes(binary[18:20], "little")
    if machine != _MACHINES[target.backend]:
        raise GpuBuildError(f"{target.name}: ELF machine {machine}, expected {_MACHINES[target.backend]}")
    sections = int.from_bytes(binary[40:48], "little")
    end = sections + int.from_bytes(binary[58:60], "little") * int.from_bytes(binary[60:62], "little")
    if sections == 0 or end > len(binary):
        raise GpuBuildError(f"{target.name}: the ELF file is cut short ({len(binary)} of {end} bytes)")


def _resources(job: _Job, assembly: str, binary: bytes, shared: int) -> Resources:
    threads = job.kernel.warps * job.target.warp_size
    if job.target.backend == "hip":
        spilled = _amd(assembly, "vgpr_spill_count") + _amd(assembly, "sgpr_spill_count")
        scratch = _amd(assembly, "private_segment_fixed_size")
        return Resources(_amd(assembly, "vgpr_count"), 4 * spilled + scratch, shared, threads)
    usage = _cuda_usage(binary)
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], shared, threads)


def _amd(assembly: str, key: str) -> int:
    """A number of the kernel's metadata at the end of AMD assembly."""
    found = re.search(rf"\.{key}:\s*(\d+)", assembly)
    if found is None:
        raise GpuBuildError(f"the assembly holds no .{key}")
    return int(found.group(1))


def _cuda_usage(binary: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only kernel in a cubin; stack and local memory hold what was spilled."""
    with private_scratch() as folder:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(binary)
        command = [str(_cuobjdump()), "-res-usage", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", result.stdout))
    if set(found) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise GpuBuildError(f"cuobjdump gave no resource usage: {(result.stderr or result.stdout)[:200]!r}")
    return {name: int(value) for name, value in found.items()}


def _cuobjdump() -> Path:
    """The tool that Triton ships; found without loading Triton, which would settle what kind of process this is."""
    for file in importlib.metadata.files("triton") or ():
        if file.name == "cuobjdump":
            return Path(str(file.locate()))
    raise GpuBuildError("cuobjdump is missing from the triton package; install triton from its wheel")
