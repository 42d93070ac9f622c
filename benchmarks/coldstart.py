"""`python -m benchmarks.coldstart`: from a fresh process to the first token, cold and warm, beside torch.compile.

    python -m benchmarks.coldstart                      # Gemma; --model smollm2 or minilm
    python -m benchmarks.coldstart --quick              # ours alone, once
    python -m benchmarks.coldstart --write              # also benchmarks/results/ and docs/performance.md

Cold: an empty cache folder of its own for every run. Warm: a second process with the folder that the cold one left.
Everybody takes turns (cold, warm, cold, warm ...). The model's file has been read before: disks are not measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.machine import MachineBusy, Watch, ceilings, check_idle, describe
from benchmarks.measure import one_line, summarize
from benchmarks.publish import ROOT, Circumstances, report, update_page, write_results
from benchmarks.rows import Row
from torchweld.models.builtin import find_builtin

BUSY_CODE: Final = 3
TIMEOUT: Final = 900.0
"""Seconds of one process."""
CACHES: Final = ("TORCHWELD_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class StartFailed(RuntimeError):
    """A process that did not come to its second token: its last line."""


@dataclass(frozen=True)
class Start:
    """One way to start: which system, with which precision, and whether its cache folder is empty."""

    system: str
    precision: str
    warm: bool

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.system} {self.precision}, {'warm' if self.warm else 'cold'}"


def run_child(start: Start, model: str, cache: Path, threads: int) -> dict[str, float]:
    """Seconds by phase of one fresh process that uses this cache folder. Raises StartFailed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    for name in CACHES:
        folder = cache / name.lower()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment[name] = str(folder)
    command = [sys.executable, "-m", "benchmarks.coldstart_child", start.system, model, start.precision]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartFailed(f"no second token within {TIMEOUT:.0f} s") from None
    if done.returncode:
        raise StartFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    phases: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**phases, "all phases": sum(phases.values())}


def measure_starts(
    systems: list[tuple[str, str]],
    rounds: int,
    run: Callable[[Start, Path], dict[str, float]],
    say: Callable[[str], None],
) -> tuple[dict[Start, list[dict[str, float]]], dict[Start, str]]:
    """In each round every system cold, then warm with the folder of that cold start; and why some failed.

    A system that fails once is out: a warm start after a failed cold one would not be warm.
    """
    samples: dict[Start, list[dict[str, float]]] = {}
    failures: dict[Start, str] = {}
    for _ in range(rounds):
        for system, precision in systems:
            with tempfile.TemporaryDirectory(prefix="coldstart-") as folder:
                for warm in (False, True):
                    start = Start(system, precision, warm)
                    if any(Start(system, precision, kind) in failures for kind in (False, True)):
                        continue
                    say(start.name)
                    try:
                        phases = run(start, Path(folder))
                        samples.setdefault(start, []).append(phases)
                    except Exception as error:  # one that fails must not lose the others
                        failures[start] = one_line(error)
    return samples, failures


def to_rows(
    model: str, samples: dict[Start, list[dict[str, float]]], failures: dict[Start, str], watch: Watch
) -> list[Row]:
    """A row for every phase of every start, in seconds, and one for every failure."""
    disturbance = watch.stop()
    rows = []
    for start, runs in samples.items():
        for phase in runs[0]:
            summary = summarize([run[phase] for run in runs])
            rows.append(
                Row(
                    model, phase, start.name, summary.median, summary.spread, "s", None, summary.mean, summary.std,
                    summary.count, load=disturbance.load, others=disturbance.others, steal=disturbance.steal,
                    disturbed=disturbance.disturbed,
                )
            )  # fmt: skip
    rows += [
        Row(model, "all phases", start.name, None, None, "s", None, reason=reason)
        for start, reason in failures.items()
    ]
    return rows


def main(
    model: Annotated[str, typer.Option(help="gemma3, smollm2 or minilm.")] = "gemma3",
    threads: Annotated[int, typer.Option(min=1, help="Of every system.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    precision: Annotated[str, typer.Option(help="Of ours: f32, bf16 or int8.")] = "f32",
    quick: Annotated[
        bool, typer.Option("--quick", help="One round of ours only: under two minutes.")
    ] = False,
    only_ours: Annotated[bool, typer.Option("--only-ours", help="Without torch.compile.")] = False,
    busy: Annotated[bool, typer.Option("--busy", help="Measure even if others use the machine.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the results into the repository.")] = False,
) -> None:
    """Measure the way to the first token."""
    try:
        before = check_idle(busy)
    except MachineBusy as refusal:
        _say(str(refusal))
        raise typer.Exit(BUSY_CODE) from None
    # its path: a built-in name would be looked up, and put together, in the empty cache folder
    path = str(find_builtin(model))
    systems = [("torchweld", precision)] + ([] if only_ours or quick else [("torch.compile", "bf16")])
    rounds = 1 if quick else rounds
    watch = Watch()
    samples, failures = measure_starts(
        systems, rounds, lambda start, folder: run_child(start, path, folder, threads), _say
    )
    rows = to_rows(model, samples, failures, watch)
    circumstances = Circumstances(
        date.today(), describe(), ceilings(threads), before, watch.stop(), threads, rounds
    )
    text = report(rows, circumstances)
    print(text, end="")
    if write:
        _say(f"wrote {write_results(f'coldstart-{model}', rows, text, circumstances)}")
        update_page("coldstart", text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
