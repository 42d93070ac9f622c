"""Run a product through ATen where that is faster for its number of rows: measured here, remembered, and reported.

Every kernel that has a form in ATen (codegen/library_call.py) and more than 64 rows at the sizes of the inputs at hand
is timed in turn with that form. Where ATen wins by more than 5 %, the whole program is timed with and without it: two
teams of threads in one program get into each other's way, which a kernel alone does not show. It stays if the program
is faster. Verdicts are kept in the kernel cache by CPU, torch, threads, precision, the kernel's C++ and bucket of rows.

When: at optimize(), for the sizes of its inputs; at calls with sizes of a new bucket only with Options(tune="calls").
Never for a step of decoding, which promises the same bits at any number of rows.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import torch
from torch import Tensor

from torchweld.codegen.cache import Cache, JsonValue, make_key
from torchweld.codegen.cpp import print_unit
from torchweld.codegen.executable import Executable
from torchweld.codegen.instructions import chosen_path, cpu_features
from torchweld.codegen.library_runs import MOST_OWN_ROWS, bucket_of
from torchweld.codegen.plan import Launch
from torchweld.optimizer.compile import Compiled
from torchweld.optimizer.gate import measure
from torchweld.optimizer.ledger import LibraryRecord, Phase
from torchweld.optimizer.report import Report

log = logging.getLogger(__name__)

MARGIN: Final = 1.05
"""ATen has to be faster by this factor; less is the noise of a clock."""
ROUNDS: Final = 3
BUDGET_SECONDS: Final = 3.0
"""After so long no further kernel is measured; the whole program is, where one of them won."""


class Timer(Protocol):
    """Median milliseconds of two functions that compute the same, timed in turn. what: for messages."""

    def __call__(
        self, what: str, ours: Callable[[], object], aten: Callable[[], object]
    ) -> tuple[float, float]: ...


def clock(what: str, ours: Callable[[], object], aten: Callable[[], object]) -> tuple[float, float]:
    """The timer that is used outside of tests."""
    verdict = measure(ours, aten, ROUNDS)
    log.info("%s: ours %.3f ms, ATen %.3f ms", what, verdict.compiled_ms, verdict.eager_ms)
    return verdict.compiled_ms, verdict.eager_ms


@dataclass(frozen=True)
class _Candidate:
    """A kernel with a form in ATen, and what it is at the sizes at hand."""

    launch: Launch
    rows: int
    shapes: str

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.launch.kernel.name


def choose_library(
    compiled: Compiled, flat_inputs: Sequence[object], cache: Cache, timer: Timer | None = None
) -> tuple[LibraryRecord, ...]:
    """Decide for every kernel at the sizes of `flat_inputs`; the new decisions, which the report gets as well.

    What the report has decided for these buckets already is left alone, so a warm start measures nothing twice.
    """
    executable, built = compiled.executable, compiled.built
    if executable is None or built is None:
        return ()
    began = time.perf_counter()
    tensors = [value for at in built.tensor_inputs if isinstance(value := flat_inputs[at], Tensor)]
    report = compiled.report
    _apply(executable, report)
    known = {place(record) for record in report.library if record.ours_ms is not None}
    found = [c for c in _candidates(executable, tensors) if (c.name, bucket_of(c.rows)) not in known]
    if not found:
        return ()
    records = _decide(executable, found, tensors, cache, timer or clock, began)
    before = [record for record in report.library if place(record) not in set(map(place, records))]
    names = {record.kernel for record in before}
    refused = [
        LibraryRecord(name, 0, "", None, None, False, reason)
        for name, reason in built.not_in_library.items()
        if name not in names
    ]
    seconds = Phase("against ATen", time.perf_counter() - began)
    library = (*before, *records, *refused)
    compiled.report = replace(report, library=library, phases=(*report.phases, seconds))
    return records


def place(record: LibraryRecord) -> tuple[str, int]:
    """What a record decides: the kernel and the bucket of rows."""
    return record.kernel, bucket_of(record.rows)


def _apply(executable: Executable, report: Report) -> None:
    """Make the executable do what the report says of it: after a warm start it does not yet."""
    wanted = _wanted(report.library)
    if wanted != executable.library.chosen:
        executable.use_library(wanted)


def _wanted(records: Sequence[LibraryRecord]) -> dict[str, frozenset[int]]:
    """Buckets by kernel."""
    wanted: dict[str, frozenset[int]] = {}
    for record in records:
        if record.chosen:
            wanted[record.kernel] = wanted.get(record.kernel, frozenset()) | {bucket_of(record.rows)}
    return wanted


def _candidates(executable: Executable, tensors: Sequence[Tensor]) -> Iterator[_Candidate]:
    """One per kernel that has a form in ATen and rows enough."""
    plan, table = executable.plan, executable.sizes_of(tensors)
    readable = {spec.name for spec in plan.inputs} | set(plan.constants) | set(plan.values)
    seen: set[str] = set()
    for launch in plan.launches():
        name = launch.kernel.name
        call = plan.library.get(name)
        if call is None or name in seen or not readable.issuperset(launch.read()):
            continue
        seen.add(name)
        rows = table(call.rows)
        if rows > MOST_OWN_ROWS:
            shapes = _counted(f"{rows}x{product.depth}x{product.columns}" for product in call.products)
            yield _Candidate(launch, rows, " and ".join(shapes))


def _counted(texts: Iterable[str]) -> list[str]:
    """Equal texts as one: "3 of 1024x384x384"."""
    return [text if count == 1 else f"{count} of {text}" for text, count in Counter(texts).items()]


def _decide(
    executable: Executable, found: Sequence[_Candidate], tensors: Sequence[Tensor], cache: Cache, timer: Timer,
    began: float,
) -> tuple[LibraryRecord, ...]:  # fmt: skip
    """The verdicts, from the cache as far as they are there; the executable runs as they say."""
    keys = [_key(executable, candidate) for candidate in found]
    stored = [_stored(cache, key, candidate) for key, candidate in zip(keys, found, strict=True)]
    records = []
    executable(*tensors)  # places and caches as in a call
    for candidate, known in zip(found, stored, strict=True):
        records.append(known or _measure(executable, candidate, tensors, timer, began))
    fresh = [known is None for known in stored]
    records = _confirm(executable, records, fresh, tensors, timer)
    for key, record, new in zip(keys, records, fresh, strict=True):
        if new and record.ours_ms is not None:
            content: JsonValue = [record.rows, record.ours_ms, record.aten_ms, record.chosen, record.reason]
            cache.put_json(key, content, {"kind": "verdict", "name": record.kernel})
    return tuple(records)


def _measure(
    executable: Executable, candidate: _Candidate, tensors: Sequence[Tensor], timer: Timer, began: float
) -> LibraryRecord:
    """One kernel alone."""
    name, rows, shapes = candidate.name, candidate.rows, candidate.shapes
    if executable.threads != torch.get_num_threads():
        reason = f"not measured: {executable.threads} threads of ours, {torch.get_num_threads()} of torch"
        return LibraryRecord(name, rows, shapes, None, None, False, reason)
    if time.perf_counter() - began > BUDGET_SECONDS:
        reason = f"not measured: {BUDGET_SECONDS:g} s had been spent on others"
        return LibraryRecord(name, rows, shapes, None, None, False, reason)
    ours, aten = timer(f"{name} {shapes}", *executable.single_runs(name, tensors))
    chosen = ours > aten * MARGIN
    return LibraryRecord(name, rows, shapes, ours, aten, chosen, "", executable.library.copied_bytes(name))


def _confirm(
    executable: Executable,
    records: Sequence[LibraryRecord],
    fresh: Sequence[bool],
    tensors: Sequence[Tensor],
    timer: Timer,
) -> list[LibraryRecord]:
    """The verdicts after the whole program was timed with and without what was newly chosen."""
    before = executable.library.chosen
    settled = [record for record, new in zip(records, fresh, strict=True) if not new]
    without = _joined(before, _wanted(settled))
    with_aten = _joined(without, _wanted(records))
    executable.use_library(without)
    if with_aten == without:
        return list(records)

    def run(choices: Mapping[str, frozenset[int]]) -> Callable[[], object]:
        def call() -> object:
            if executable.library.chosen != choices:
                executable.use_library(choices)
            return executable(*tensors)

        return call

    ours, aten = timer("the whole program", run(without), run(with_aten))
    if aten < ours:
        executable.use_library(with_aten)
        return list(records)
    executable.use_library(without)
    reason = f"faster alone, but the whole program takes {aten:.3g} ms with it and {ours:.3g} ms without"
    return [
        replace(record, chosen=False, reason=reason) if new and record.chosen else record
        for record, new in zip(records, fresh, strict=True)
    ]


def _joined(
    first: Mapping[str, frozenset[int]], second: Mapping[str, frozenset[int]]
) -> dict[str, frozenset[int]]:
    names = [*first, *second]
    return {name: first.get(name, frozenset()) | second.get(name, frozenset()) for name in names}


def _key(executable: Executable, candidate: _Candidate) -> str:
    """What a verdict depends on."""
    kernel = replace(candidate.launch.kernel, name="kernel", sources=(), ops=())
    printed = print_unit([executable.packed_kernel(candidate.launch, kernel)], executable.precision)
    machine = (platform.machine(), chosen_path(), *sorted(cpu_features()), torch.__version__)
    how = (str(executable.threads), str(torch.get_num_threads()), executable.precision)
    form = repr(executable.plan.library[candidate.name])
    return make_key("library verdict", *machine, *how, form, printed.source, str(bucket_of(candidate.rows)))


def _stored(cache: Cache, key: str, candidate: _Candidate) -> LibraryRecord | None:
    """The verdict of an earlier process; None where there is none that can be read."""
    match cache.get_json(key):
        case [int(rows), float(ours), float(aten), bool(chosen), str(reason)]:
            shapes = candidate.shapes.replace(f"{candidate.rows}x", f"{rows}x")
            return LibraryRecord(candidate.name, rows, shapes, ours, aten, chosen, reason)
    return None
