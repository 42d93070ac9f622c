"""Statistics of a generation in physical units, as a table and as JSON.

readings = read_statistics(generation.statistics, model)
print_table(readings, console)
json.dumps(to_json(readings))
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final, Protocol, TypeAlias, runtime_checkable

from rich.console import Console
from rich.table import Table

from torchweld.codegen.cache import Cache
from torchweld.codegen.probe import measured_target
from torchweld.decoding.controller import break_even
from torchweld.decoding.pass_costs import costs_of
from torchweld.decoding.statistics import Statistics
from torchweld.decoding.step_model import StepModel
from torchweld.optimizer.compile import Compiled

Number: TypeAlias = "int | float | str | list[int] | None"
WIDTH: Final = 80
_BAR: Final = 40


@runtime_checkable
class Reported(Protocol):
    """A model whose step was compiled, with a report of what it reads."""

    def compiled(self) -> Compiled:
        """The compiled step."""


@dataclass(frozen=True)
class Readings:
    """Statistics, and what they mean on this machine. None: not known for this model.

    bytes_per_pass: read and written by a pass of one row behind a typical text. read_gb_s: the machine's ceiling.
    break_even: the rate of acceptance from which guesses pay, at the cost that guessing and passes had.
    precision: of products with stored weights (codegen/cpp_packed.py); None where torch's kernels ran.
    """

    statistics: Statistics
    bytes_per_pass: int | None = None
    read_gb_s: float | None = None
    break_even: float | None = None
    precision: str | None = None

    @property
    def gb_s(self) -> float | None:
        """Bytes of the model's passes over the time that they took, 1e9 per second; without those of a draft."""
        seconds = self.statistics.decode_seconds - self.statistics.proposal_seconds
        if self.bytes_per_pass is None or seconds <= 0.0:
            return None
        return self.bytes_per_pass * self.statistics.passes / seconds / 1e9

    @property
    def share_of_read(self) -> float | None:
        """`gb_s` over the machine's ceiling. Above 1 where weights stay in a cache."""
        gb_s = self.gb_s
        return None if gb_s is None or self.read_gb_s is None else gb_s / self.read_gb_s


def read_statistics(statistics: Statistics, model: StepModel) -> Readings:
    """Statistics of a generation by `model` with what is known of the machine, measured now or before."""
    if not isinstance(model, Reported):
        return Readings(statistics)
    compiled = model.compiled()
    moved = sum(launch.bytes_moved for launch in compiled.report.launches)
    least = None
    if statistics.drafted:
        costs = costs_of(model)
        least = break_even(costs, statistics.proposal_seconds / statistics.drafted / costs.seconds[0])
    return Readings(
        statistics, moved or None, measured_target(Cache()).read_gb_s, least, precision_of(compiled)
    )


def precision_of(compiled: Compiled | None) -> str | None:
    """What a compiled program computes products with stored weights in; None where torch's kernels run it."""
    executable = None if compiled is None else compiled.executable
    return None if executable is None else executable.precision


def to_json(readings: Readings) -> dict[str, Number]:
    """All numbers by name, with units in the names."""
    s = readings.statistics
    numbers: dict[str, Number] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(s).items()}
    return numbers | {
        "precision": readings.precision,
        "tokens_per_second": s.tokens_per_second,
        "tokens_per_pass": s.tokens_per_pass,
        "mean_accepted": s.mean_accepted,
        "acceptance_rate": s.acceptance_rate,
        "break_even_acceptance": readings.break_even,
        "bytes_per_pass": readings.bytes_per_pass,
        "gb_s": readings.gb_s,
        "read_gb_s": readings.read_gb_s,
        "share_of_read": readings.share_of_read,
    }


def summary(statistics: Statistics) -> str:
    """One line: tokens, speed, and how they were found."""
    s = statistics
    text = f"{s.new_tokens} tokens, {s.tokens_per_second:.1f} tokens/s, {s.strategy}"
    if s.speculative_passes:
        text += f" ({s.tokens_per_pass:.2f} tokens per pass, {s.accepted} of {s.drafted} guesses accepted)"
    return text


def print_table(readings: Readings, console: Console) -> None:
    """Everything that is known, at most 80 columns wide."""
    table = Table(title=f"decoding: {readings.statistics.strategy}", title_justify="left", box=None)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit or share")
    for row in _rows(readings):
        table.add_row(*row)
    console.print(table, width=min(WIDTH, console.width))
    if any(readings.statistics.accepted_lengths):
        console.print(_histogram(readings.statistics), width=min(WIDTH, console.width))


def _rows(readings: Readings) -> list[tuple[str, str, str]]:
    s = readings.statistics
    rows = [
        ("prompt", f"{s.prompt_tokens}", "tokens"),
        ("new", f"{s.new_tokens}", "tokens"),
        ("time to first token", f"{s.first_token_seconds * 1e3:.1f}", "ms"),
        ("speed", f"{s.tokens_per_second:.1f}", "tokens/s behind the first"),
        ("passes", f"{s.passes}", f"{s.tokens_per_pass:.2f} tokens each"),
    ]
    if readings.precision is not None:
        rows.append(("precision", readings.precision, "for products with stored weights"))
    gb_s, share = readings.gb_s, readings.share_of_read
    if gb_s is not None and share is not None:
        rows.append(
            ("memory", f"{gb_s:.1f}", f"GB/s, {share:.0%} of this machine's {readings.read_gb_s:.1f}")
        )
    if s.drafted:
        rows += [
            ("guesses", f"{s.drafted}", f"in {s.speculative_passes} of the passes"),
            (
                "accepted",
                f"{s.accepted}",
                f"{s.acceptance_rate:.0%} of the guesses, {s.mean_accepted:.2f} per pass",
            ),
            ("guessing took", f"{s.proposal_seconds * 1e3:.1f}", f"ms of {s.decode_seconds * 1e3:.1f}"),
        ]
        needed = "no rate" if readings.break_even is None else f"{readings.break_even:.0%}"
        rows.append(("break-even acceptance", needed, "from which guesses pay"))
    return rows


def _histogram(statistics: Statistics) -> Table:
    table = Table(title="accepted guesses per pass", title_justify="left", box=None)
    table.add_column("accepted", justify="right")
    table.add_column("passes", justify="right")
    table.add_column("", no_wrap=True)
    most = max(statistics.accepted_lengths)
    for length, count in enumerate(statistics.accepted_lengths):
        table.add_row(f"{length}", f"{count}", "█" * max(int(count > 0), round(_BAR * count / most)))
    return table
