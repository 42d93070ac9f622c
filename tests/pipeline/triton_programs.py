"""Run whole programs with their kernels printed in Triton and run by Triton's interpreter.

`python -m tests.pipeline.triton_programs FOLDER NAME...` prints one JSON line per program; a name is a seed of
`generate` or a name of `edge_cases`.  A process of its own, because Triton is an interpreter or a compiler from
the moment it is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from tests.generators.graphs import generate
from tests.pipeline.edge_cases import CASES
from tests.pipeline.stages import Judge, compile_stages, program_of, run_plan, traced
from torchweld.codegen.ir import Kernel
from torchweld.codegen.triton import build_triton


class TritonRunner:
    """Prints each kernel once into `folder` and launches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[int, ModuleType] = {}
        self.kept: list[Kernel] = []

    def __call__(
        self, kernel: Kernel, buffers: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> dict[str, Tensor]:
        module = self.modules.get(id(kernel)) or self.load(kernel)
        updated = {b.name: buffers[b.name].clone() for b in kernel.buffers if b.role == "update"}
        buffers = {**buffers, **updated}
        inputs = [buffers[buffer.name] for buffer in kernel.buffers if buffer.role != "output"]
        outputs = [buffer.name for buffer in kernel.buffers if buffer.role == "output"]
        results = module.launch(*inputs, **{size: sizes[size] for size in kernel.sizes})
        return dict(zip(outputs, results, strict=True)) | updated

    def load(self, kernel: Kernel) -> ModuleType:
        """The printed kernel as a module."""
        printed = build_triton(kernel)
        name = f"kernel_{len(self.kept)}"
        path = self.folder / f"{name}.py"
        head = "import torch\nimport triton\nimport triton.language as tl\n\n\n"
        path.write_text(f"{head}{printed.source}\n\n{printed.launcher}", encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.modules[id(kernel)] = module
        self.kept.append(kernel)
        return module


def check(name: str, run: TritonRunner) -> None:
    """Raise the judge's StageFailure unless the program's Triton kernels give the right results."""
    if name in CASES:
        function, inputs = CASES[name]
        program, label = traced(function, inputs), name
    else:
        case = generate(int(name))
        program, inputs, label = program_of(case), case.inputs, case.description
    judge = Judge(program, inputs, label, lambda: str(program.graph))
    stages = compile_stages(program, judge)
    judge.stage("triton", lambda *flat: run_plan(stages.built, flat, run))


def main(folder: Path, names: list[str]) -> None:
    """One line per program: its name and what is wrong with it, or null."""
    torch.set_num_threads(1)
    run = TritonRunner(folder)
    for name in names:
        problem = None
        try:
            check(name, run)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps({"name": name, "problem": problem}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
