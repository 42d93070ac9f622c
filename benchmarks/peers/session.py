"""One run of many systems: model by model, all systems of a model at once, in turns; nothing that fails stops it.

Loading and compiling happen before the first timed run, one system after the other, all others stopped. Then every
workload is measured in rounds: each system once per round (A B A B ...).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Final

from benchmarks.machine import Watch
from benchmarks.measure import Outcome, interleave, one_line, summarize
from benchmarks.peers.inputs import agreement
from benchmarks.peers.process import SystemFailed, SystemProcess
from benchmarks.peers.systems import SystemSpec
from benchmarks.roofline import ModelFacts, least_work, load_facts
from benchmarks.rows import Row, measured_row, missing_row
from benchmarks.workloads import Workload
from torchweld.graph.target import Target

Say = Callable[[str], None]
REFERENCE: Final = "eager f32"
"""The system whose results the others' are compared with."""
PAUSE: Final = 0.05
"""Seconds before each turn: the processes before have come to rest."""
MINIMUM_AGREEMENT: Final = 0.9
"""Cosine below which a system computes something else, and its times mean nothing."""


@dataclass(frozen=True)
class Plan:
    """How a session goes. *_timeout: seconds after which a system that does not answer is given up."""

    threads: int
    rounds: int
    quick: bool
    load_timeout: float = 300.0
    prepare_timeout: float = 1200.0
    run_timeout: float = 300.0


def workloads_of(model: str, quick: bool) -> tuple[Workload, ...]:
    """pp512 and tg128 (quick: tg32) of a language model; MiniLM at batch 1, 8, 32 by 16, 128, 512 (quick: three)."""
    if model == "minilm":
        shapes = (
            [(1, 16), (8, 16), (1, 128)] if quick else [(b, s) for b in (1, 8, 32) for s in (16, 128, 512)]
        )
        return tuple(Workload(model, "encode", batch, length) for batch, length in shapes)
    return Workload(model, "prefill", 1, 512), Workload(model, "decode", 1, 32 if quick else 128)


def measure_models(
    models: Sequence[str], systems: Sequence[SystemSpec], plan: Plan, ceiling: Target, say: Say
) -> tuple[list[Row], dict[str, str]]:
    """Rows of all models, and for each system the line that says its version and settings."""
    rows: list[Row] = []
    descriptions: dict[str, str] = {}
    for model in models:
        able = [spec for spec in systems if model in spec.models]
        try:
            rows += _ModelRun(model, plan, ceiling, say).measure(able, descriptions)
        except Exception as error:  # a model that cannot be loaded must not lose the others
            say(f"{model}: {one_line(error)}")
            rows += [
                missing_row(workload, spec.name, one_line(error))
                for workload in workloads_of(model, plan.quick) for spec in able
            ]  # fmt: skip
    return rows, descriptions


def absent_reason(spec: SystemSpec, quick: bool) -> str | None:
    """Why this system does not take part at all, or None."""
    for package in spec.requires:
        if find_spec(package) is None:
            return f"package {package!r} is not installed (requirements-benchmarks.txt)"
    if quick and spec.slow:
        return "left out by --quick: it compiles for minutes"
    return None


class _ModelRun:
    """All systems on one model."""

    def __init__(self, model: str, plan: Plan, ceiling: Target, say: Say) -> None:
        self._model, self._plan, self._ceiling, self._say = model, plan, ceiling, say
        self._workloads = workloads_of(model, plan.quick)
        self._agreements: dict[str, float | None] = {}

    def measure(self, systems: Sequence[SystemSpec], descriptions: dict[str, str]) -> list[Row]:
        """Their rows, workload by workload in the order of the systems."""
        facts = load_facts(self._model)
        with ExitStack() as stack:
            running, reasons = self._start(systems, stack, descriptions)
            self._compare_answers(running, reasons)
            rows = []
            for workload in self._workloads:
                rows += self._measure_workload(workload, systems, running, reasons, facts)
        return rows

    def _start(
        self, systems: Sequence[SystemSpec], stack: ExitStack, descriptions: dict[str, str]
    ) -> tuple[dict[str, SystemProcess], dict[str, str]]:
        """The processes that have loaded the model, and why the others have not."""
        running: dict[str, SystemProcess] = {}
        reasons: dict[str, str] = {}
        for spec in systems:
            if (reason := absent_reason(spec, self._plan.quick)) is not None:
                reasons[spec.name] = reason
                continue
            self._say(f"{self._model}: {spec.name} loads")
            log = stack.enter_context(tempfile.NamedTemporaryFile(prefix="benchmark-", suffix=".log"))
            process = SystemProcess(spec, self._plan.threads, log.file)
            stack.callback(process.close)
            try:
                descriptions[spec.name] = process.load(
                    self._model, self._plan.threads, self._plan.load_timeout
                )
                running[spec.name] = process
            except SystemFailed as failure:
                process.close()
                reasons[spec.name] = f"cannot load the model: {failure}"
                self._say(f"{self._model}: {spec.name} {reasons[spec.name]}")
        return running, reasons

    def _compare_answers(self, running: dict[str, SystemProcess], reasons: dict[str, str]) -> None:
        """Cosines with the reference; a system that computes something else is out."""
        answers: dict[str, list[float] | None] = {}
        for name, process in list(running.items()):
            try:
                answers[name] = process.answer(self._plan.prepare_timeout)
            except SystemFailed as failure:
                process.close()
                del running[name]
                reasons[name] = f"cannot compute: {failure}"
                self._say(f"{self._model}: {name} {reasons[name]}")
        reference = answers.get(REFERENCE)
        for name, answer in answers.items():
            if answer is None or reference is None:
                continue
            cosine = self._agreements[name] = agreement(answer, reference)
            if cosine is None or cosine < MINIMUM_AGREEMENT:
                running.pop(name).close()
                reasons[name] = f"its result differs from {REFERENCE}: cosine {cosine}"

    def _measure_workload(
        self,
        workload: Workload,
        systems: Sequence[SystemSpec],
        running: dict[str, SystemProcess],
        reasons: dict[str, str],
        facts: ModelFacts,
    ) -> list[Row]:
        failed = dict(reasons)
        for name, process in running.items():
            self._say(f"{self._model} {workload.name}: {name} prepares")
            try:
                process.prepare(workload, self._plan.prepare_timeout)
            except SystemFailed as failure:
                failed[name] = str(failure)
        ready = {name: process for name, process in running.items() if name not in failed}
        self._say(
            f"{self._model} {workload.name}: {self._plan.rounds} rounds of {', '.join(ready) or 'nobody'}"
        )
        watch = Watch([os.getpid(), *(process.pid for process in ready.values())])
        runs = {
            name: partial(process.run, workload, self._plan.run_timeout) for name, process in ready.items()
        }
        outcomes = interleave(runs, self._plan.rounds, PAUSE)
        return [self._row(workload, spec, outcomes.get(spec.name), failed, facts, watch) for spec in systems]

    def _row(
        self,
        workload: Workload,
        spec: SystemSpec,
        outcome: Outcome | None,
        failed: dict[str, str],
        facts: ModelFacts,
        watch: Watch,
    ) -> Row:
        if outcome is None or not outcome.samples:
            reason = failed.get(spec.name) or (outcome.failure if outcome else None) or "did not run"
            return missing_row(workload, spec.name, reason)
        return measured_row(
            workload,
            spec.name,
            summarize([workload.in_unit(seconds) for seconds in outcome.samples]),
            least_work(facts, workload, spec.weight_bytes, spec.kv_bytes),
            self._ceiling,
            watch.stop(),
            peak_gflops=peak_of(spec, self._ceiling),
            agreement=self._agreements.get(spec.name),
            reason=outcome.failure,
        )


def peak_of(spec: SystemSpec, ceiling: Target) -> float:
    """The machine's measured rate of the arithmetic that this system uses."""
    return {"f32": ceiling.f32_gflops, "bf16": ceiling.bf16_gflops, "int8": ceiling.int8_gops}[
        spec.arithmetic
    ]


def with_ceiling(
    rows: Sequence[Row], systems: Sequence[SystemSpec], before: Target, after: Target
) -> list[Row]:
    """The same rows with shares of another ceiling (the better of two measurements, known at the end)."""
    specs = {spec.name: spec for spec in systems}

    def scaled(row: Row) -> Row:
        if row.share_of_read is None or row.share_of_flops is None:
            return row
        flops = peak_of(specs[row.system], before) / peak_of(specs[row.system], after)
        read = before.read_gb_s / after.read_gb_s
        return replace(row, share_of_read=row.share_of_read * read, share_of_flops=row.share_of_flops * flops)

    return [scaled(row) for row in rows]
