"""Never slower: the compiled program against the captured graph, run eagerly, at the sizes of the example.

The compiled program stays only if it is at least as fast.  Measured in turn (A B A B), medians; one eager run decides
where the compiled program wins clearly, so that a slow model is not run many times for a foregone conclusion.

torch's OpenMP threads go on spinning for some milliseconds after a call, and would take a core from whatever is timed
next; so every sample waits until they sleep, and has a warm-up call of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from torchweld.codegen.release_pages import FilePages, release_free_memory
from torchweld.graph.program import Program
from torchweld.graph.stand_ins import DecodedInPieces
from torchweld.optimizer.compile import Compiled
from torchweld.optimizer.ledger import Fallback, PassRecord

NAME = "keep_if_faster"
ROUNDS = 5
CLEARLY = 1.5
TOLERANCE = 1.03
SETTLE_SECONDS = 0.02
WORTH_WARMING_MS = 50.0


@dataclass(frozen=True)
class Verdict:
    """Median milliseconds of both at the example's sizes."""

    compiled_ms: float
    eager_ms: float

    @property
    def keep(self) -> bool:
        """Whether the compiled program may stay; a difference within the noise of a clock does not count."""
        return self.compiled_ms <= self.eager_ms * TOLERANCE


def keep_if_faster(compiled: Compiled, program: Program, flat_inputs: Sequence[object]) -> Verdict | None:
    """Take the executable back if it is slower than the captured graph; the verdict goes into the report.

    None where the program runs eagerly anyway.
    """
    if compiled.executable is None:
        return None
    pages = FilePages()
    eager = partial(_run_eagerly, program, flat_inputs, pages)
    verdict = measure(lambda: compiled(*flat_inputs), eager)
    saving = (verdict.eager_ms - verdict.compiled_ms) * 1e3
    record = PassRecord(NAME, "exact", 1, (), 1, verdict.keep, measured_saving_us=saving)
    report = replace(compiled.report, passes=(*compiled.report.passes, record))
    if not verdict.keep:
        reason = f"slower than torch at these sizes: {verdict.compiled_ms:.3f} ms against {verdict.eager_ms:.3f} ms"
        compiled.executable, compiled.eager_reason = None, reason
        report = replace(report, fallbacks=(Fallback("the whole program", reason),))
    else:
        compiled.executable.release_stored()  # the captured graph has read them once more
        release_free_memory()
    compiled.report = report
    return verdict


def _run_eagerly(program: Program, flat_inputs: Sequence[object], pages: FilePages) -> object:
    """The captured graph, without a whole output head in float32 and the model's file beside its packed weights."""

    def release(rows: Tensor) -> None:
        pages.release(rows.data_ptr(), rows.data_ptr() + rows.nbytes)

    with DecodedInPieces(release):
        return program.graph_module(*flat_inputs)


def measure(compiled: Callable[[], object], eager: Callable[[], object], rounds: int = ROUNDS) -> Verdict:
    """Time both in turn."""
    ours: list[float] = []
    theirs: list[float] = []
    with torch.no_grad():
        compiled()
        for _ in range(rounds):
            ours.append(_sample(compiled, ours))
            theirs.append(_sample(eager, theirs))
            if ours[-1] * CLEARLY < theirs[-1]:
                break
    return Verdict(statistics.median(ours), statistics.median(theirs))


def _sample(run: Callable[[], object], before: Sequence[float]) -> float:
    """One timed call, after the other side's threads have gone to sleep and ours have been woken."""
    time.sleep(SETTLE_SECONDS)
    if not before or before[-1] < WORTH_WARMING_MS:
        first = _milliseconds(run)
        if first > WORTH_WARMING_MS:
            return first
    return _milliseconds(run)


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3
