"""Progress is shown on a terminal and nowhere else."""

import io

from rich.console import Console

from torchweld.optimizer.progress import show_phase, show_share


def shown(terminal: bool) -> str:
    stream = io.StringIO()
    with show_phase("load", "model[1]", Console(file=stream, force_terminal=terminal, width=80)):
        pass
    return stream.getvalue()


def test_a_terminal_gets_the_phase() -> None:
    assert "load model[1]" in shown(True)


def test_elsewhere_it_is_silent() -> None:
    assert shown(False) == ""


def shown_share(terminal: bool) -> str:
    stream = io.StringIO()
    with show_share(
        "compare", "model[1]", 4, Console(file=stream, force_terminal=terminal, width=80)
    ) as advance:
        advance(1)
    return stream.getvalue()


def test_a_share_is_shown_on_a_terminal_alone() -> None:
    assert "compare model[1]" in shown_share(True) and "25%" in shown_share(True)
    assert shown_share(False) == ""
