"""`python -m benchmarks.peers`: ours and the peers on the same weights, in one interleaved run per model.

    python -m benchmarks.peers                          # everything; an hour, most of it torch.compile
    python -m benchmarks.peers --quick                  # short runs, no torch.compile; under three minutes
    python -m benchmarks.peers --models smollm2 --systems torchweld,llama.cpp -o json
    python -m benchmarks.peers --write                  # also benchmarks/results/ and docs/performance.md

A model is kept by --write as soon as it is measured, so an hour that is broken off has lost the last one only.
Tables go to standard output, progress to standard error. Exit code 3: the machine is busy.
"""

from __future__ import annotations

import signal
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import Disturbance, MachineBusy, Watch, ceilings, check_idle, describe
from benchmarks.peers.session import Plan, measure_models, with_ceiling
from benchmarks.peers.systems import MODELS, SystemSpec, chosen_systems
from benchmarks.plot import to_svg
from benchmarks.publish import Circumstances, report, update_page, write_results
from benchmarks.rows import FORMATS, Format, Row, render, write_text
from benchmarks.verdicts import to_markdown, verdicts
from torchweld.codegen.probe import better_ceilings

BUSY_CODE = 3


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Short runs, without torch.compile.")] = False,
    output: Annotated[str, typer.Option("-o", "--output", help=f"Format: {', '.join(FORMATS)}.")] = "md",
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    systems: Annotated[str | None, typer.Option(help="Comma-separated beginnings of names [all].")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of every system.")] = 2,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of each system [7; quick: 3].")] = None,
    busy: Annotated[bool, typer.Option("--busy", help="Measure even if others use the machine.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the rows as an SVG picture.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the results into the repository.")] = False,
) -> None:
    """Measure torchweld and its peers in turns on the same weights."""
    try:
        chosen = _models(models)
        taking_part = chosen_systems(systems, chosen)
        format = _format(output)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        before = check_idle(busy)
    except MachineBusy as refusal:
        _say(str(refusal))
        raise typer.Exit(BUSY_CODE) from None
    # so that being ended also ends the systems and what they started
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    plan = Plan(threads, rounds or (3 if quick else 7), quick)
    rows: list[Row] = []
    for model in chosen:
        mine, text = _measure_model(model, taking_part, plan, before, write)
        rows += mine
        if format == "md":
            print(text, flush=True)
    if format != "md":
        print(render(rows, format), end="")
    if plot is not None:
        write_text(plot, to_svg(rows))


def _measure_model(
    model: str, systems: tuple[SystemSpec, ...], plan: Plan, before: Disturbance, write: bool
) -> tuple[list[Row], str]:
    """The rows of one model and their report; with `write` also in the results and on the page."""
    _say(f"{model}: measuring the ceilings of this machine")
    first, watch = ceilings(plan.threads), Watch()
    rows, descriptions = measure_models([model], systems, plan, first, _say)
    during = watch.stop()
    ceiling = better_ceilings(first, ceilings(plan.threads))
    rows = with_ceiling(rows, systems, first, ceiling)
    circumstances = Circumstances(
        date.today(),
        describe(),
        ceiling,
        before,
        during,
        plan.threads,
        plan.rounds,
        tuple(descriptions.items()),
    )
    text = report(rows, circumstances, to_markdown(verdicts(rows)))
    if write:
        _say(f"wrote {write_results(f'peers-{model}', rows, text, circumstances)}")
        update_page(f"peers-{model}", text)
    return rows, text


def _models(names: str) -> tuple[str, ...]:
    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    if not wanted or not set(wanted) <= set(MODELS):
        raise ValueError(f"models {names!r}: expected some of {', '.join(MODELS)}")
    return wanted


def _format(name: str) -> Format:
    for format in FORMATS:
        if format == name:
            return format
    raise ValueError(f"format {name!r}: expected one of {', '.join(FORMATS)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
