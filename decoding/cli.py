"""The whole command line: that of the optimizer, and `torchweld generate`, which needs this room.

`main` is the entry point of the `torchweld` script.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from torchweld.optimizer.cli import Model, Threads, app, run


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 32,
    threads: Threads = None,
    eager: Annotated[bool, typer.Option("--eager", help="Run torch's own kernels instead of ours.")] = False,
    cache: Annotated[
        bool | None,
        typer.Option("--cache/--recompute", help="Decode with the derived KV cache [from 96 tokens on]."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt as a user's turn (ChatML).")] = False,
) -> None:
    """Continue a text greedily with the language model MODEL."""
    # Lazily, as in optimizer/cli.py: these import torch.
    from torchweld.decoding.complete import complete
    from torchweld.optimizer.commands.subject import Wish

    complete(model, Wish(threads=threads), prompt, tokens, eager=eager, chat=chat, cache=cache)


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    return run(app, sys.argv[1:])
