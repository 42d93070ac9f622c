"""What is going on while it takes long: one line on stderr with the time; silent without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def show_phase(name: str, detail: str = "", console: Console | None = None) -> Iterator[None]:
    """Show `name detail` while the body runs, and take the line away afterwards.

    console: stderr unless given.
    """
    console = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(f"{name} {detail}".strip(), total=None)
        yield


@contextmanager
def show_share(
    name: str, detail: str, total: int, console: Console | None = None
) -> Iterator[Callable[[int], object]]:
    """As `show_phase`, with a bar: the body says with the function that it gets how much of `total` it has done."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name} {detail}".strip(), total=total)
        yield lambda count: progress.advance(task, count)
