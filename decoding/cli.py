"""The whole command line: that of the optimizer, and `torchweld generate`, which needs this room.

`main` is the entry point of the `torchweld` script.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from torchweld.optimizer.cli import Json, Model, PrecisionOption, Threads, app, run
from torchweld.optimizer.failures import INTERRUPTED

__all__ = ["app", "generate", "main"]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    decode: Annotated[
        str, typer.Option(metavar="HOW", help="auto, plain, draft, lookup, lookahead or medusa.")
    ] = "auto",
    tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--tokens", min=1, help="At most this many new tokens.")
    ] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Draw tokens at this temperature (else the likeliest).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among the K likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw among the fewest that reach P.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw among those at least P times the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Divide logits of tokens in the text.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="For the same draws again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write the prompt as a user's turn, by the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's turn before it.")] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="A text that the answer may copy from; may be repeated.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="With --decode draft: a smaller model (else the model itself with fewer layers).",
        ),
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="With --decode medusa: a file of trained heads.")] = None,
    threads: Threads = None,
    precision: PrecisionOption = "f32",
    eager: Annotated[bool, typer.Option("--eager", help="Run torch's own kernels instead of ours.")] = False,
    cache: Annotated[
        bool,
        typer.Option("--cache/--recompute", help="Decode with the derived KV cache, or without one."),
    ] = True,
    json: Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print all statistics as a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the accepted lengths into this SVG file.")] = None,
) -> None:
    """Continue a text with the language model MODEL, as it comes. Ctrl-C ends the text."""
    # Lazily, as in optimizer/cli.py: this imports torch.
    from torchweld.decoding.generate_command import GenerateWish, Sampling, run_generate
    from torchweld.optimizer.commands.subject import check_precision

    wish = GenerateWish(
        model=model,
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        decode=decode,
        max_new_tokens=tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stops=tuple(stop or ()),
        chat=chat,
        system=system,
        references=tuple(reference or ()),
        draft=draft,
        heads=heads,
        threads=threads,
        precision=check_precision(precision),
        eager=eager,
        cache=cache,
        as_json=json,
        table=stats,
        plot=plot,
    )
    if not run_generate(wish):
        raise typer.Exit(INTERRUPTED)


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    return run(app, sys.argv[1:])
