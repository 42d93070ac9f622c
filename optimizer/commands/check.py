"""`torchweld check`: the float64 comparison after every pass and at the end."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from torchweld.optimizer.commands.subject import Wish, capture_subject, load_subject
from torchweld.optimizer.report import finite
from torchweld.optimizer.report_tables import Column, Table
from torchweld.optimizer.verify import CheckReport, check_program


def check_model(spec: str, wish: Wish, console: Console, *, as_json: bool) -> bool:
    """Compare every stage of MODEL's compilation with float64, a line for each; True if all pass."""
    subject = load_subject(spec, wish)
    program = capture_subject(subject)
    with subject.phase("check"):
        flat = program.flatten_inputs(subject.inputs, {})
        result = check_program(program, flat, options=wish.options())
    if as_json:
        print(json_text(result, subject.loaded.name))
        return result.ok
    console.print(stage_table(result, f"{subject.loaded.name}, inputs {subject.sizes}").to_rich())
    for stage in result.stages:
        for reason in stage.reasons:
            console.print(f"{stage.name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(verdict(result), markup=False, highlight=False)
    return result.ok


def verdict(result: CheckReport) -> str:
    """One sentence: whether all is well, and the error of what the user gets."""
    error = f"max relative error {result.max_relative_error:.2e}"
    if not result.ok:
        wrong = ", ".join(stage.name for stage in result.stages if not stage.ok)
        return f"BEYOND the tolerance table: {wrong} ({error})"
    return f"all {len(result.stages)} stages are within the tolerance table ({error})"


def json_text(result: CheckReport, model: str) -> str:
    """The verdict and every stage as JSON; errors that are not finite as strings."""
    content = {"model": model, "max_relative_error": result.max_relative_error, **asdict(result)}
    return json.dumps(finite(content), indent=2, allow_nan=False)


def stage_table(result: CheckReport, title: str) -> Table:
    """One line per stage."""
    columns = (
        Column("stage", "left", wide=True),
        Column("ok", "left"),
        Column("max relative error"),
        Column("max abs"),
        Column("s"),
    )
    rows = tuple(
        (
            stage.name,
            "yes" if stage.ok else "NO",
            f"{stage.max_relative_error:.2e}",
            f"{stage.max_abs:.2e}",
            f"{stage.seconds:.2f}",
        )
        for stage in result.stages
    )
    return Table(title, columns, rows)
