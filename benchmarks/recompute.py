"""`python -m benchmarks.recompute`: one more token with the derived cache, against recomputing all positions.

    python -m benchmarks.recompute                              # SmolLM2 and Gemma 3 at 512 tokens, a table
    python -m benchmarks.recompute --model smollm2 --positions 2048 -o json
    python -m benchmarks.recompute --write                      # also benchmarks/results/

Both ways give the logits of position N - 1, in turns on the same machine. With the cache: a step of one token behind
N - 1 cached ones. Without: the same compiled kernels run all N tokens from an empty cache and give the logits of the
last one. That is the fastest way to do without a cache: a graph without one has logits of all N positions. Bytes are
those that the cache takes when it holds N positions; the least is what must be kept of them,
the sum over the layers of min(N, window) x 2 x key heads x head size x 4 bytes.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Final

import torch
import typer

from benchmarks.machine import MachineBusy, Watch, check_idle
from benchmarks.measure import interleave, one_line, seconds_per_call, summarize
from benchmarks.peers.inputs import tokens
from benchmarks.peers.ours import options_for
from benchmarks.publish import write_dated
from benchmarks.rows import FORMATS, Format
from torchweld import load_model
from torchweld.decoding.cached import CachedModel
from torchweld.models.errors import ModelFileError
from torchweld.passes.step_program import LayerState

BUSY_CODE: Final = 3
MODELS: Final = ("smollm2", "gemma3")
LEAST_RATIO: Final = 20.0
"""Times that a step with the cache must be faster."""
MOST_BYTES: Final = 1.05
"""Times the least bytes that the cache may take."""
LEAST_SECONDS: Final = 0.5
"""Of the steps of one round together."""


@dataclass(frozen=True)
class RecomputeRow:
    """One model at one length.

    cached, recomputed: tokens per second, medians over the rounds. ratio: median over the rounds of one over the other
    in the same round. cache_bytes: taken when `positions` are cached; least_bytes: what must be kept of them. same: do
    both ways give the same most likely token? disturbed: others took part of the machine. reason: why there are no
    numbers.
    """

    model: str
    positions: int
    cached: float | None
    recomputed: float | None
    ratio: float | None
    cache_bytes: int = 0
    least_bytes: int = 0
    rounds: int = 0
    same: bool | None = None
    disturbed: bool = False
    reason: str | None = None

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes taken over the least."""
        return self.cache_bytes / self.least_bytes if self.least_bytes else None

    @property
    def reached(self) -> bool:
        """Is the promise kept, in speed and in bytes?"""
        if self.ratio is None or self.bytes_ratio is None:
            return False
        return self.ratio >= LEAST_RATIO and self.bytes_ratio <= MOST_BYTES


def least_bytes(states: Sequence[LayerState], positions: int) -> int:
    """The fewest bytes that hold what `positions` positions of one sequence leave visible."""
    return sum(
        state.bytes_per_token * (min(positions, state.window) if state.window else positions)
        for state in states
    )


def measure_model(
    name: str, model: CachedModel, positions: int, rounds: int, least_seconds: float = LEAST_SECONDS
) -> RecomputeRow:
    """Both ways in turns; `positions` >= 2. The first run of each is not counted."""
    text = [token % model.vocab_size for token in tokens(positions)]
    last = torch.tensor([text[-1:]])

    def step() -> torch.Tensor:
        return model.step(last)[0, 0]

    def undo() -> None:
        model.truncate(positions - 1)

    again = model.prefill([text])[0]
    model.prefill([text[:-1]])
    same = int(step().argmax()) == int(again.argmax())
    taken, least = model.cache.nbytes, least_bytes(model.states, positions)
    # a cache of its own: recomputing must not take the place of what the steps stand behind
    other = model.with_cache()

    def cached() -> float:
        spent = calls = 0.0
        while spent < least_seconds or not calls:
            undo()
            start = time.perf_counter()
            step()
            spent, calls = spent + time.perf_counter() - start, calls + 1
        return calls / spent

    def recomputed() -> float:
        return 1.0 / seconds_per_call(lambda: other.prefill([text]), least_seconds)

    watch = Watch()
    outcomes = interleave({"cached": cached, "recomputed": recomputed}, rounds)
    disturbed = watch.stop().disturbed
    for outcome in outcomes.values():
        if outcome.failure is not None:
            return RecomputeRow(name, positions, None, None, None, taken, least, reason=outcome.failure)
    quick, slow = (outcomes[way].samples for way in ("cached", "recomputed"))
    ratio = statistics.median(a / b for a, b in zip(quick, slow, strict=True))
    return RecomputeRow(
        name, positions, summarize(quick).median, summarize(slow).median, ratio, taken, least, rounds, same, disturbed
    )  # fmt: skip


def render(rows: Sequence[RecomputeRow], format: Format) -> str:
    """The rows as a text that ends with a newline. ValueError for another format."""
    if format == "md":
        return _to_markdown(rows)
    records = [{**asdict(row), "bytes_ratio": row.bytes_ratio, "reached": row.reached} for row in rows]
    if format == "json":
        return json.dumps(records, indent=1, allow_nan=False) + "\n"
    if format == "csv":
        out = io.StringIO()
        names = [*(field.name for field in fields(RecomputeRow)), "bytes_ratio", "reached"]
        writer = csv.DictWriter(out, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()
    raise ValueError(f"format {format!r}: expected md, csv or json")


def _to_markdown(rows: Sequence[RecomputeRow]) -> str:
    lines = [
        f"| model | tokens | cached tok/s | recomputed tok/s | ratio (>= {LEAST_RATIO:g}) | cache MB | least MB "
        f"| bytes (<= {MOST_BYTES:g}) | same token | reached |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    lines += [_line(row) for row in rows if row.reason is None]
    if any(row.disturbed for row in rows):
        lines += ["", "\\* others or the host took more than 5 % of the processor meanwhile"]
    notes = [f"- {row.model}: {row.reason}" for row in rows if row.reason is not None]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _line(row: RecomputeRow) -> str:
    mark = " \\*" if row.disturbed else ""
    cells = (
        row.model, str(row.positions), f"{row.cached:.2f}{mark}", f"{row.recomputed:.3f}", f"{row.ratio:.1f}",
        f"{row.cache_bytes / 1e6:.2f}", f"{row.least_bytes / 1e6:.2f}", f"{row.bytes_ratio or 0.0:.3f}",
        "yes" if row.same else "NO", "yes" if row.reached else "NO",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def measure_named(
    name: str, positions: int, precision: str, threads: int | None, rounds: int, say: Callable[[str], None]
) -> RecomputeRow:
    """Load, compile and measure one model; why there are no numbers, where something fails."""
    try:
        say(f"{name}: compile")
        torch.set_num_threads(threads or torch.get_num_threads())
        model = CachedModel.from_module(load_model(name).module, options=options_for(precision, threads))
        say(f"{name}: {positions} tokens, {rounds} rounds")
        return measure_model(name, model, positions, rounds)
    except ModelFileError:
        raise
    except Exception as error:  # the other model goes on
        return RecomputeRow(name, positions, None, None, None, reason=one_line(error))


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="smollm2, gemma3 or another MODEL; may be repeated.")
    ] = None,
    positions: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 512,
    output: Annotated[str, typer.Option("-o", help="md, csv or json.")] = "md",
    precision: Annotated[str, typer.Option(help="f32, bf16 or int8.")] = "f32",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (all cores).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds (5; 2 with --quick).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    busy: Annotated[bool, typer.Option("--busy", help="Measure even if others use the machine.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the results into benchmarks/results/.")] = False,
) -> None:
    """Compare decoding with the derived cache to recomputing every position."""
    if output not in FORMATS:
        raise typer.BadParameter(f"-o {output!r}: expected one of {', '.join(FORMATS)}")
    turns = rounds or (2 if quick else 5)
    try:
        options_for(precision, threads)
        check_idle(busy)
        rows = [measure_named(m, positions, precision, threads, turns, _say) for m in model or MODELS]
    except MachineBusy as refusal:
        _say(str(refusal))
        raise typer.Exit(BUSY_CODE) from None
    except (ModelFileError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    print(render(rows, output), end="")
    if write:
        _write(rows, precision, turns)


def _write(rows: Sequence[RecomputeRow], precision: str, rounds: int) -> None:
    path = write_dated("recompute", f"{rounds} rounds", precision, render(rows, "md"), render(rows, "json"))
    _say(f"wrote {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
