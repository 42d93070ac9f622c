"""Rows of a benchmark, and how they are written: Markdown, CSV and JSON.

A row is one system at one workload of one model. A system that could not run has its row too: no median, but a reason.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Literal

from benchmarks.machine import Disturbance
from benchmarks.measure import Summary
from benchmarks.roofline import Work
from benchmarks.workloads import Workload
from torchweld.graph.target import Target

Format = Literal["md", "csv", "json"]
FORMATS: Final[tuple[Format, ...]] = ("md", "csv", "json")


@dataclass(frozen=True)
class Row:
    """One system at one workload.

    median, spread (half the distance between the quartiles), mean, std: in `unit` (tok/s or ms per call).
    gb_s: bytes that the system must read at least (its weights, its cache) per second; gflops: operations likewise.
    share_of_read, share_of_flops: of the machine's measured ceilings, 0 to 1. others, steal: shares of all CPU time
    that went elsewhere meanwhile. agreement: cosine between its result and that of Hugging Face in f32 on the same
    input. reason: why there is no median.
    """

    model: str
    workload: str
    system: str
    median: float | None
    spread: float | None
    unit: str
    share_of_read: float | None
    mean: float | None = None
    std: float | None = None
    runs: int = 0
    gb_s: float | None = None
    gflops: float | None = None
    share_of_flops: float | None = None
    agreement: float | None = None
    load: float | None = None
    others: float | None = None
    steal: float | None = None
    disturbed: bool = False
    reason: str | None = None


def measured_row(
    workload: Workload,
    system: str,
    summary: Summary,
    work: Work,
    ceiling: Target,
    disturbance: Disturbance,
    *,
    peak_gflops: float | None = None,
    agreement: float | None = None,
    reason: str | None = None,
) -> Row:
    """The row of a system that ran; peak_gflops: the rate of its arithmetic (default: the ceiling of f32)."""
    seconds = workload.seconds(summary.median)
    gb_s, gflops = work.bytes / seconds / 1e9, work.flops / seconds / 1e9
    return Row(
        model=workload.model,
        workload=workload.name,
        system=system,
        median=summary.median,
        spread=summary.spread,
        unit=workload.unit,
        share_of_read=gb_s / ceiling.read_gb_s,
        mean=summary.mean,
        std=summary.std,
        runs=summary.count,
        gb_s=gb_s,
        gflops=gflops,
        share_of_flops=gflops / (peak_gflops or ceiling.f32_gflops),
        agreement=agreement,
        load=disturbance.load,
        others=disturbance.others,
        steal=disturbance.steal,
        disturbed=disturbance.disturbed,
        reason=reason,
    )


def missing_row(workload: Workload, system: str, reason: str) -> Row:
    """The row of a system that did not run, with the reason."""
    return Row(workload.model, workload.name, system, None, None, workload.unit, None, reason=reason)


def render(rows: Sequence[Row], format: Format) -> str:
    """The rows as a text that ends with a newline. ValueError for another format."""
    if format == "md":
        return to_markdown(rows)
    if format == "csv":
        return to_csv(rows)
    if format == "json":
        return to_json(rows)
    raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")


def to_json(rows: Sequence[Row]) -> str:
    """A list of objects, one per row, with every field of Row."""
    return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> tuple[Row, ...]:
    """What `to_json` wrote. ValueError where it is no list of rows."""
    values = json.loads(text)
    names = {field.name for field in fields(Row)}
    if not isinstance(values, list) or not all(isinstance(v, dict) and v.keys() <= names for v in values):
        raise ValueError(f"not a list of benchmark rows: expected objects with the keys {sorted(names)}")
    return tuple(Row(**value) for value in values)


def to_csv(rows: Sequence[Row]) -> str:
    """One line per row under a line of field names (RFC 4180); empty where there is no number."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """One table per model, workloads in the order of their rows; below it who is missing and why."""
    models = list(dict.fromkeys(row.model for row in rows))
    return "\n".join(_model_table(model, [row for row in rows if row.model == model]) for model in models)


COLUMNS: Final = ("workload", "system", "median", "± spread", "mean ± std", "unit", "GB/s", "of read",
                  "GFLOP/s", "of peak", "agreement")  # fmt: skip


def _model_table(model: str, rows: Sequence[Row]) -> str:
    present = [row for row in rows if row.median is not None]
    lines = [f"### {model}", ""]
    if present:
        lines += [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join('---:' for _ in COLUMNS)}|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in present]
        lines.append("")
    if any(row.disturbed for row in present):
        lines += ["\\* others or the host took more than 5 % of the processor meanwhile", ""]
    missing = dict.fromkeys((row.system, row.reason) for row in rows if row.reason is not None)
    for system, reason in missing:
        where = [row.workload for row in rows if (row.system, row.reason) == (system, reason)]
        lines.append(f"- {system}, {', '.join(where)}: {_escaped(reason or '')}")
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    mark = " \\*" if row.disturbed else ""
    return (
        row.workload,
        row.system,
        _number(row.median) + mark,
        _number(row.spread),
        f"{_number(row.mean)} ± {_number(row.std)}",
        row.unit,
        _number(row.gb_s),
        _percent(row.share_of_read),
        _number(row.gflops),
        _percent(row.share_of_flops),
        "" if row.agreement is None else f"{row.agreement:.5f}",
    )


def _number(value: float | None) -> str:
    """Three figures or more: 0.123, 1.23, 12.3, 123, 1234."""
    if value is None:
        return ""
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
