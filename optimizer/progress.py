"""What is going on while it takes long: one line on stderr with the time; silent without a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


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
