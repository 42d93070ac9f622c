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
from torchweld.graph.fusion import Measure
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.optimizer.ledger import PassRecord

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


class PassErrors:
    """Listens to the pipeline (`Options.after_pass`) and keeps what every pass added to the largest relative error."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._last = oracle.stage("captured", lambda *_: oracle.eager).max_relative_error
        self.added: list[tuple[str, float]] = []

    def __call__(self, name: str, module: fx.GraphModule) -> None:
        """Judge the graph after a pass."""
        error = self._oracle.stage(name, lambda *flat: tuple(module(*flat))).max_relative_error
        self.added.append((name, error - self._last))
        self._last = error

    def written_into(self, passes: Sequence[PassRecord]) -> tuple[PassRecord, ...]:
        """The records with `error_added`: 0 for a pass that changed nothing."""
        pending = list(self.added)
        result = []
        for record in passes:
            added = 0.0
            if record.applied and pending and pending[0][0] == record.name:
                added = pending.pop(0)[1]
            result.append(replace(record, error_added=added))
        return tuple(result)


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


def compile_and_compare(
    program: Program,
    inputs: Sequence[object],
    *,
    level: int,
    options: Options,
    name: str | None = None,
    measure: Measure | None = None,
) -> tuple[Compiled, StageCheck | None]:
    """Compile `program` and put errors against float64 into the report, as TORCHWELD_VERIFY counts its levels.

    inputs: flat.  level: 0 compares nothing, 1 the executable, 2 every pass that changes something as well.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if level == 0:
        return compile_program(
            program, options=options, example_inputs=tensors, name=name, measure=measure
        ), None
    oracle = Oracle(program, inputs)
    errors = PassErrors(oracle) if level > 1 else None
    chosen = replace(options, after_pass=errors) if errors is not None else options
    compiled = compile_program(program, options=chosen, example_inputs=tensors, name=name, measure=measure)
    check = oracle.stage("executable", compiled)
    passes = compiled.report.passes if errors is None else errors.written_into(compiled.report.passes)
    compiled.report = replace(compiled.report, passes=passes, max_relative_error=check.max_relative_error)
    return compiled, check
