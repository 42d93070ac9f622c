"""Where results go: a dated table per kind of machine in benchmarks/results/, and a copy between markers in a page.

The markers are HTML comments, so that the page renders without them:

    <!-- peers:begin -->
    ...
    <!-- peers:end -->
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

from benchmarks.machine import Description, Disturbance, describe
from benchmarks.plot import to_svg
from benchmarks.rows import Row, to_json, to_markdown, write_text
from torchweld.graph.target import Target

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "performance.md"


class MarkersMissing(ValueError):
    """A page without exactly one pair of markers: names the page and the markers."""


def write_dated(name: str, settings: str, precision: str, table: str, rows: str) -> Path:
    """Keep a benchmark's table (Markdown) and rows (JSON text) in the results, under day and machine; the table's path.

    settings: with what it was measured, in words behind the precision.
    """
    machine, day = describe(), date.today().isoformat()
    heading = (
        f"# {name}\n\nMeasured on {day}: {machine.processor}, {machine.cpus} CPUs, {machine.system}; "
        f"{precision}, {settings}.\n\n"
    )
    path = RESULTS / f"{day}-{machine.slug}-{name}-{precision}.md"
    write_text(path, heading + table)
    write_text(path.with_suffix(".json"), rows)
    return path


@dataclass(frozen=True)
class Circumstances:
    """Under which the rows came about."""

    day: date
    machine: Description
    ceiling: Target
    before: Disturbance
    during: Disturbance
    threads: int
    rounds: int
    systems: tuple[tuple[str, str], ...] = ()

    def to_markdown(self) -> str:
        """A few lines above the tables."""
        top, m = self.ceiling, self.machine
        lines = [
            f"Measured on {self.day.isoformat()}: {m.processor}, {m.cpus} CPUs, {m.memory_gb} GB, {m.system}, "
            f"Python {m.python}; {self.threads} threads, {self.rounds} rounds.",
            "",
            f"Ceilings of this machine ({top.origin}, {top.cores} cores): read {top.read_gb_s:.1f} GB/s, "
            f"f32 {top.f32_gflops:.0f} GFLOP/s, bf16 {top.bf16_gflops:.0f} GFLOP/s, int8 {top.int8_gops:.0f} GOP/s.",
            "",
            f"Before the run: {self.before}. During it: {self.during}.",
            "",
        ]
        lines += [f"- {name}: {settings}" for name, settings in self.systems]
        return "\n".join(lines + ([""] if self.systems else []))


def report(rows: Sequence[Row], circumstances: Circumstances, verdicts: str = "") -> str:
    """The circumstances, the verdicts and the tables, in Markdown."""
    parts = [circumstances.to_markdown(), verdicts, to_markdown(rows)]
    return "\n".join(part for part in parts if part)


def write_results(
    name: str, rows: Sequence[Row], text: str, circumstances: Circumstances, folder: Path = RESULTS
) -> Path:
    """Write DATE-MACHINE-NAME as .md, .json and .svg; the path of the .md. A later run of the same day replaces it."""
    path = folder / f"{circumstances.day.isoformat()}-{circumstances.machine.slug}-{name}.md"
    write_text(path, f"# {name}\n\n{text}")
    write_text(path.with_suffix(".json"), to_json(rows))
    write_text(path.with_suffix(".svg"), to_svg(rows))
    return path


def update_page(name: str, text: str, page: Path = PAGE) -> None:
    """Put `text` between the page's markers of that name. Raises MarkersMissing; the page is then as it was."""
    write_text(page, replace_between(page.read_text("utf-8"), name, text, str(page)))


def replace_between(page: str, name: str, text: str, place: str = "the page") -> str:
    """The page with another text between `<!-- name:begin -->` and `<!-- name:end -->`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise MarkersMissing(f"{place}: expected one {begin} and behind it one {end}")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}"
