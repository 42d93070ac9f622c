"""Proof against float64: the captured graph in double precision is the reference, after every pass and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from torchweld.graph.compare import (
    Comparison,
    NonFiniteException,
    Outputs,
    changed_inputs,
    compare,
    reference_float64,
    snapshot,
)
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options, compile_program

WRITTEN_EXCEPTIONS = frozenset(NonFiniteException)


@dataclass(frozen=True)
class StageCheck:
    """One stage against float64; errors are relative to the row's largest magnitude."""

    name: str
    ok: bool
    max_relative_error: float
    max_abs: float
    seconds: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """All stages of one compilation; `executable` is False where the end of the line ran eagerly."""

    stages: tuple[StageCheck, ...]
    ok: bool
    executable: bool

    @property
    def max_relative_error(self) -> float:
        """The error of what the user gets: the last stage's."""
        return self.stages[-1].max_relative_error if self.stages else 0.0


class Oracle:
    """Judges flat outputs of one program at fixed inputs; the eager run in its own dtypes is the yardstick."""

    def __init__(self, program: Program, inputs: Sequence[object]) -> None:
        self.inputs = tuple(inputs)
        self.reference: Outputs = reference_float64(program.graph_module, self.inputs)
        with torch.no_grad():
            self.eager = tuple(program.graph_module(*self.inputs))
        self.dtype = compute_dtype(program)

    def judge(self, outputs: Sequence[object]) -> Comparison:
        """Compare with float64."""
        return compare(
            tuple(outputs),
            self.reference,
            dtype_of_compute=self.dtype,
            eager=self.eager,
            exceptions=WRITTEN_EXCEPTIONS,
        )

    def stage(self, name: str, run: Callable[..., Sequence[object]]) -> StageCheck:
        """Run a stage and judge it; the inputs must come out unchanged."""
        start = time.perf_counter()
        before = snapshot(self.inputs)
        with torch.no_grad():
            outputs = run(*self.inputs)
        verdict = self.judge(outputs)
        changed = changed_inputs(before, self.inputs)
        reasons = verdict.reasons + tuple(f"input {number} was changed" for number in changed)
        ok = verdict.ok and not changed
        return StageCheck(
            name, ok, verdict.max_relative_error, verdict.max_abs, time.perf_counter() - start, reasons
        )


def compute_dtype(program: Program) -> torch.dtype:
    """The coarsest floating dtype that a program computes in."""
    order = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    found = {value.dtype for node in program.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)}
    return next((dtype for dtype in order if dtype in found), torch.float32)


def check_program(
    program: Program, inputs: Sequence[object], *, options: Options | None = None
) -> CheckReport:
    """Compile `program`, comparing with float64 after every pass and at the end; `inputs` are flat."""
    oracle = Oracle(program, inputs)
    stages = [oracle.stage("captured", lambda *flat: tuple(program.graph_module(*flat)))]

    def after_pass(name: str, module: fx.GraphModule) -> None:
        stages.append(oracle.stage(name, lambda *flat: tuple(module(*flat))))

    chosen = replace(options or Options(), after_pass=after_pass)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    compiled = compile_program(program, options=chosen, example_inputs=tensors)
    stages.append(oracle.stage("executable" if compiled.executable else "eager fallback", compiled))
    return CheckReport(tuple(stages), all(stage.ok for stage in stages), compiled.executable is not None)


def add_error(compiled: Compiled, program: Program, inputs: Sequence[object]) -> StageCheck:
    """Compare a compiled program with float64 once and put the error into its report.

    program: the captured program before any pass.
    """
    result = Oracle(program, inputs).stage("executable", compiled)
    compiled.report = replace(compiled.report, max_relative_error=result.max_relative_error)
    return result
