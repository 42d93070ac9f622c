"""Rows of `benchmarks.decoding`, and how they are written."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from benchmarks.measure import summarize
from benchmarks.rows import Format


@dataclass(frozen=True)
class DecodingRow:
    """One strategy on one text of one model.

    tokens_per_second, spread: median over the rounds and half the distance between the quartiles, behind the first
    token. ratio_to_plain: median over the rounds of its speed over plain decoding's in the same round. The others are
    counts of one run (every run gives the same). same_as_plain: does it give the text of plain decoding? disturbed:
    others took part of the machine meanwhile. reason: why there are no numbers.
    """

    model: str
    text: str
    strategy: str
    tokens_per_second: float | None
    ratio_to_plain: float | None
    mean_accepted: float | None
    spread: float | None = None
    tokens_per_pass: float | None = None
    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    same_as_plain: bool | None = None
    disturbed: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Counts:
    """What a run of a strategy did, apart from its speed."""

    tokens: tuple[int, ...]
    passes: int
    drafted: int
    accepted: int
    mean_accepted: float
    tokens_per_pass: float


def measured_row(
    model: str,
    text: str,
    strategy: str,
    counts: Counts,
    plain_counts: Counts,
    speeds: Sequence[float],
    plain: Sequence[float],
    disturbed: bool,
) -> DecodingRow:
    """The row of a strategy that ran; speeds, plain: tokens per second of the same rounds, in turns."""
    summary = summarize(speeds)
    return DecodingRow(
        model=model,
        text=text,
        strategy=strategy,
        tokens_per_second=summary.median,
        ratio_to_plain=statistics.median(a / b for a, b in zip(speeds, plain, strict=True)),
        mean_accepted=counts.mean_accepted,
        spread=summary.spread,
        tokens_per_pass=counts.tokens_per_pass,
        tokens=len(counts.tokens),
        passes=counts.passes,
        drafted=counts.drafted,
        accepted=counts.accepted,
        rounds=summary.count,
        same_as_plain=counts.tokens == plain_counts.tokens,
        disturbed=disturbed,
    )


def missing_row(model: str, text: str, strategy: str, reason: str) -> DecodingRow:
    """The row of a strategy that did not run."""
    return DecodingRow(model, text, strategy, None, None, None, reason=reason)


def render(rows: Sequence[DecodingRow], format: Format) -> str:
    """The rows as a text that ends with a newline. ValueError for another format."""
    if format == "md":
        return to_markdown(rows)
    if format == "csv":
        return to_csv(rows)
    if format == "json":
        return json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"
    raise ValueError(f"format {format!r}: expected md, csv or json")


def to_csv(rows: Sequence[DecodingRow]) -> str:
    """One line per row under a line of field names."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(DecodingRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def to_markdown(rows: Sequence[DecodingRow]) -> str:
    """One table per model; below it what did not run and why."""
    models = list(dict.fromkeys(row.model for row in rows))
    return "\n".join(_table(model, [row for row in rows if row.model == model]) for model in models)


def _table(model: str, rows: Sequence[DecodingRow]) -> str:
    lines = [
        f"### {model}",
        "",
        "| text | strategy | tok/s | ± spread | of plain | accepted | tokens per pass | passes | same text |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [_line(row) for row in rows if row.reason is None]
    if any(row.disturbed for row in rows):
        lines += ["", "\\* others or the host took more than 5 % of the processor meanwhile"]
    reasons = dict.fromkeys((row.strategy, row.reason) for row in rows if row.reason is not None)
    notes = [f"- {strategy}: {reason}" for strategy, reason in reasons]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _line(row: DecodingRow) -> str:
    mark = " \\*" if row.disturbed else ""
    cells = (
        row.text,
        row.strategy,
        f"{row.tokens_per_second:.1f}{mark}",
        f"{row.spread:.1f}",
        f"{row.ratio_to_plain:.2f}",
        f"{row.mean_accepted:.2f}" if row.drafted else "",
        f"{row.tokens_per_pass:.2f}",
        f"{row.passes}",
        "yes" if row.same_as_plain else "NO",
    )
    return f"| {' | '.join(cells)} |"
