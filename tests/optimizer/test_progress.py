"""Progress is shown on a terminal and nowhere else."""

import io

from rich.console import Console

from torchweld.optimizer.progress import show_phase


def shown(terminal: bool) -> str:
    stream = io.StringIO()
    with show_phase("load", "model[1]", Console(file=stream, force_terminal=terminal, width=80)):
        pass
    return stream.getvalue()


def test_a_terminal_gets_the_phase() -> None:
    assert "load model[1]" in shown(True)


def test_elsewhere_it_is_silent() -> None:
    assert shown(False) == ""
