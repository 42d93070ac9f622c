"""`torchweld explain` and `torchweld optimize`: print or write a report."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from torchweld.optimizer.commands.subject import Job
from torchweld.optimizer.report import Report
from torchweld.optimizer.suggest import check_name

_SUFFIXES = (".json", ".md")


def print_report(report: Report, console: Console, *, as_json: bool, as_markdown: bool) -> None:
    """Print to stdout: JSON, Markdown, or tables."""
    if as_json:
        print(report.to_json())
    elif as_markdown:
        print(report.to_markdown(), end="")
    else:
        report.render(console)


def summarize(report: Report, console: Console) -> None:
    """Print the headline figures."""
    console.print(report.title(), style="bold", markup=False)
    for label, text in report.summary():
        console.print(f"  {label:<19} {text}", markup=False, highlight=False)
    seconds = ", ".join(f"{phase.name} {phase.seconds:.2f}" for phase in report.phases)
    text = f"  {'compile time':<19} {seconds or 'not measured'} s"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def check_report_path(path: Path) -> None:
    """UnknownNameError unless the file's ending says which form to write; before the long work."""
    check_name("report ending", path.suffix, _SUFFIXES, f"--out {path}")


def write_report(report: Report, path: Path) -> None:
    """Write JSON or Markdown, as the ending says. Raises OSError where the file cannot be written."""
    path.write_text(report.to_json() if path.suffix == ".json" else report.to_markdown(), encoding="utf-8")


def is_right(job: Job) -> bool:
    """False, and a line on stderr, if the result was compared with float64 and is beyond tolerance."""
    if job.verdict is None or job.verdict.ok:
        return True
    print(f"torchweld: beyond the tolerance table: {'; '.join(job.verdict.reasons)}", file=sys.stderr)
    return False
