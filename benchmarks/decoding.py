"""`python -m benchmarks.decoding`: plain decoding against every strategy, on four kinds of text.

    python -m benchmarks.decoding                                  # SmolLM2 and Gemma 3, a table
    python -m benchmarks.decoding --model smollm2 --quick -o json
    python -m benchmarks.decoding --heads smollm2=heads.safetensors --write

The texts (benchmarks/texts/) are prose, a question in a chat, a change of given code, and a word-for-word copy. In
every round each strategy writes the same number of tokens in turn, so that all meet the same machine. "lookup" guesses
wherever it can; "auto" is lookup that gives up where it does not pay; "reference" is given the text that is copied.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, cast

import typer

from benchmarks.decoding_rows import Counts, DecodingRow, measured_row, missing_row, render
from benchmarks.machine import MachineBusy, Watch, check_idle
from benchmarks.measure import Outcome, interleave, one_line
from benchmarks.peers.ours import options_for
from benchmarks.publish import write_dated
from benchmarks.rows import FORMATS, Format
from torchweld import Options, load_model
from torchweld.decoding.chat import Message, render_chat
from torchweld.decoding.choose_strategy import GUESSES, SCHEDULES, Sources, build_model, build_proposer
from torchweld.decoding.generate import generate
from torchweld.decoding.generation import Generation
from torchweld.decoding.medusa import load_heads
from torchweld.decoding.step_model import Proposer, StepModel
from torchweld.graph.capture_causal import capture_causal
from torchweld.graph.program import Program
from torchweld.models.tokenizer import Tokenizer

BUSY_CODE: Final = 3
MODELS: Final = ("smollm2", "gemma3")
TEXTS: Final = ("prose", "chat", "code", "copy")
STRATEGIES: Final = ("plain", "auto", "lookup", "reference", "lookahead", "draft", "medusa")
PENALTIES: Final[Mapping[str, float]] = {"prose": 1.3}
"""Repetition penalties: small models otherwise fall into a loop, and prose that repeats itself would flatter lookup."""
FOLDER: Final = Path(__file__).resolve().parent / "texts"


@dataclass(frozen=True)
class Contestant:
    """A strategy that is ready: a model to decode with, and where its guesses come from."""

    model: StepModel
    proposer: Proposer | None


@dataclass(frozen=True)
class Arena:
    """A model with all strategies that could be had for it, and why the others could not."""

    name: str
    tokenizer: Tokenizer
    contestants: Mapping[str, Contestant]
    missing: Mapping[str, str]


def read_text(kind: str) -> str:
    """One of the four texts."""
    return (FOLDER / f"{kind}.txt").read_text("utf-8").rstrip("\n")


def quoted(text: str) -> str:
    """The part that a copy copies: what stands between the first pair of quotation marks."""
    found = re.search('"([^"]+)"', text)
    if found is None:
        raise ValueError("the text quotes nothing; expected a part between quotation marks")
    return found[1]


def prompt_of(kind: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text as the model wants it: the chat by its template, or as question and answer without one."""
    text = read_text(kind)
    if kind != "chat":
        return tokenizer.encode(text)
    if tokenizer.chat is None:
        return tokenizer.encode(f"Question: {text}\nAnswer:")
    return tokenizer.encode(render_chat(tokenizer, [Message("user", text)]), rendered=True)


def build_arena(
    name: str, strategies: Sequence[str], options: Options, heads: Path | None, say: Callable[[str], None]
) -> Arena:
    """Load a model and make every strategy ready; one that fails is missing, with its reason."""
    loaded = load_model(name)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; expected a language model")
    program = capture_causal(loaded.module)
    say(f"{name}: plain")
    model = build_model("plain", program, options)
    contestants, missing = {"plain": Contestant(model, None)}, {}
    for strategy in strategies:
        if strategy == "plain":
            continue
        say(f"{name}: {strategy}")
        try:
            contestants[strategy] = _contestant(strategy, model, program, tokenizer, options, heads)
        except Exception as error:  # one strategy that fails must not lose the others
            missing[strategy] = one_line(error)
    return Arena(name, tokenizer, contestants, missing)


def _contestant(
    strategy: str,
    model: StepModel,
    program: Program,
    tokenizer: Tokenizer,
    options: Options,
    heads: Path | None,
) -> Contestant:
    sources = Sources()
    if strategy == "reference":
        strategy, sources = "lookup", Sources(references=(quoted(read_text("copy")),))
    if strategy == "medusa":
        if heads is None:
            raise ValueError("needs trained heads: give --heads MODEL=FILE (examples/train_medusa_heads.py)")
        model, sources = build_model("medusa", program, options), Sources(heads=load_heads(heads))
    sample = tokenizer.encode(read_text("prose"))
    return Contestant(model, build_proposer(strategy, model, program, tokenizer, sources, options, sample))


def run(contestant: Contestant, strategy: str, prompt: Sequence[int], tokens: int, kind: str) -> Generation:
    """Write `tokens` tokens behind the prompt; end tokens do not count, so that all runs are equally long."""
    return generate(
        contestant.model,
        prompt,
        max_new_tokens=tokens,
        eos_token_id=(),
        repetition_penalty=PENALTIES.get(kind, 1.0),
        proposer=contestant.proposer,
        num_assistant_tokens=GUESSES.get(strategy),
        num_assistant_tokens_schedule=SCHEDULES.get(strategy, "adaptive"),
    )


def measure_text(arena: Arena, kind: str, tokens: int, rounds: int) -> list[DecodingRow]:
    """Rows of all strategies on one text; the first run of each is not counted."""
    prompt = prompt_of(kind, arena.tokenizer)
    counts: dict[str, Counts] = {}
    failures = dict(arena.missing)
    for strategy, contestant in arena.contestants.items():
        if strategy == "reference" and kind != "copy":
            continue
        try:
            counts[strategy] = _counts(run(contestant, strategy, prompt, tokens, kind))
        except Exception as error:  # the others go on
            failures[strategy] = one_line(error)
    if "plain" not in counts:
        return [missing_row(arena.name, kind, s, reason) for s, reason in failures.items()]

    def speed_of(strategy: str) -> Callable[[], float]:
        contestant = arena.contestants[strategy]
        return lambda: run(contestant, strategy, prompt, tokens, kind).statistics.tokens_per_second

    watch = Watch()
    outcomes = interleave({strategy: speed_of(strategy) for strategy in counts}, rounds)
    disturbed = watch.stop().disturbed
    rows = [_row(arena.name, kind, s, counts, outcomes, disturbed) for s in counts]
    return rows + [missing_row(arena.name, kind, s, reason) for s, reason in failures.items()]


def _row(
    model: str,
    kind: str,
    strategy: str,
    counts: Mapping[str, Counts],
    outcomes: Mapping[str, Outcome],
    disturbed: bool,
) -> DecodingRow:
    outcome, plain = outcomes[strategy], outcomes["plain"]
    for reason in (outcome.failure, plain.failure):
        if reason is not None:
            return missing_row(model, kind, strategy, reason)
    return measured_row(
        model, kind, strategy, counts[strategy], counts["plain"], outcome.samples, plain.samples, disturbed
    )


def _counts(generation: Generation) -> Counts:
    s = generation.statistics
    return Counts(generation.tokens, s.passes, s.drafted, s.accepted, s.mean_accepted, s.tokens_per_pass)


def parse_heads(given: Sequence[str], models: Sequence[str]) -> dict[str, Path]:
    """Files of heads by model, from MODEL=FILE. ValueError for another form, another model or a missing file."""
    found = {}
    for text in given:
        model, equals, file = text.partition("=")
        if not equals or model not in models:
            raise ValueError(f"--heads {text!r}: expected MODEL=FILE with a model of {', '.join(models)}")
        if not Path(file).is_file():
            raise ValueError(f"--heads {text!r}: no such file")
        found[model] = Path(file)
    return found


def main(
    model: Annotated[list[str] | None, typer.Option(help="smollm2, gemma3; may be repeated.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Only these besides plain; may be repeated.")
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option(help="MODEL=FILE: heads for the strategy medusa.")
    ] = None,
    output: Annotated[str, typer.Option("-o", help="md, csv or json.")] = "md",
    precision: Annotated[str, typer.Option(help="f32, bf16 or int8 (many rows cost least).")] = "int8",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (all cores).")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=8, help="New tokens per run (128; 48 with --quick).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds (9; 2 with --quick).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter and less exact.")] = False,
    busy: Annotated[bool, typer.Option("--busy", help="Measure even if others use the machine.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the results into benchmarks/results/.")] = False,
) -> None:
    """Compare the decoding strategies on four kinds of text."""
    models, wanted = tuple(model or MODELS), tuple(strategy or STRATEGIES)
    for given, known, option in ((wanted, STRATEGIES, "--strategy"), ((output,), FORMATS, "-o")):
        for name in given:
            if name not in known:
                raise typer.BadParameter(f"{option} {name!r}: expected one of {', '.join(known)}")
    try:
        files, options = parse_heads(heads or (), models), options_for(precision, threads)
        check_idle(busy)
    except MachineBusy as refusal:
        _say(str(refusal))
        raise typer.Exit(BUSY_CODE) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    tokens, rounds = tokens or (48 if quick else 128), rounds or (2 if quick else 9)
    rows: list[DecodingRow] = []
    for name in models:
        rows += _model_rows(name, wanted, options, files.get(name), tokens, rounds)
    print(render(rows, cast(Format, output)), end="")
    if write:
        _write(rows, precision, tokens, rounds)


def _model_rows(
    name: str, strategies: Sequence[str], options: Options, heads: Path | None, tokens: int, rounds: int
) -> list[DecodingRow]:
    try:
        arena = build_arena(name, strategies, options, heads, _say)
    except Exception as error:  # the other model goes on
        return [missing_row(name, kind, "plain", one_line(error)) for kind in TEXTS]
    rows = []
    for kind in TEXTS:
        _say(f"{name}: {kind}, {rounds} rounds")
        rows += measure_text(arena, kind, tokens, rounds)
    return rows


def _write(rows: Sequence[DecodingRow], precision: str, tokens: int, rounds: int) -> None:
    path = write_dated(
        "decoding", f"{tokens} tokens, {rounds} rounds", precision, render(rows, "md"), render(rows, "json")
    )
    _say(f"wrote {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
