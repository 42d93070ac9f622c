"""`make demo`: SmolLM2 from file to completion in under a minute, every step with its time.

Loads SmolLM2-135M-Instruct (Q4_1, from its package), optimizes it, compares it with float64, writes its
kernels for an H100 and for this CPU into ./kernels, prints what each pass did, and completes a prompt beside
torch eager.

    python -m examples.demo [--prompt TEXT] [--tokens N]
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from torch import Tensor

from torchweld.decoding.generate import stream
from torchweld.decoding.generate_command import language_tokenizer, recompute_model
from torchweld.decoding.generation import Generation
from torchweld.models.tokenizer import Tokenizer
from torchweld.optimizer.cli import make_console
from torchweld.optimizer.commands.baseline import decoded_model
from torchweld.optimizer.commands.dump import dump_job, parse_targets
from torchweld.optimizer.commands.subject import Wish, explain_subject, load_subject

MODEL = "smollm2"
PROMPT = "The three most important inventions of the last century are"
KERNELS = Path("kernels")
# Enough tokens for a figure on a busy machine, too, where torch eager takes a second for one.
SECONDS = 8.0


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Print a heading, run the body, print how long it took."""
    console.rule(title, align="left")
    start = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - start:.1f} s[/dim]\n")


def complete(
    call: Callable[[Tensor], object], tokenizer: Tokenizer, prompt: str, tokens: int, seconds: float
) -> Generation:
    """A greedy completion without a cache; ends early after `seconds`."""
    pieces = stream(recompute_model(call), prompt, tokenizer=tokenizer, max_new_tokens=tokens)
    end = time.perf_counter() + seconds
    for _ in pieces:
        if time.perf_counter() > end:
            pieces.close()
            break
    return pieces.generation()


def print_completions(console: Console, ours: Generation, eager: Generation) -> None:
    """The text, the two speeds, and whether the tokens are the same."""
    console.print((ours.text or "").strip(), style="italic", markup=False)
    fast, slow = ours.statistics.tokens_per_second, eager.statistics.tokens_per_second
    console.print(f"torchweld   {fast:6.1f} tokens/s  ({fast / slow if slow else 0.0:.1f} times torch eager)")
    console.print(f"torch eager {slow:6.1f} tokens/s")
    same = sum(1 for a, b in zip(ours.tokens, eager.tokens, strict=False) if a == b)
    compared = min(len(ours.tokens), len(eager.tokens))
    console.print(f"{same} of {compared} tokens are the same (greedy, recomputed for every token)")


def main() -> None:
    """Run every step in order."""
    parser = argparse.ArgumentParser(description="SmolLM2 from file to completion.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    console = make_console()

    with step(console, "load"):
        wish = Wish(sequence=8, verify=1)
        subject = load_subject(MODEL, wish)
        tokenizer = language_tokenizer(subject.loaded, MODEL)
        parameters = sum(tensor.nbytes for tensor in subject.loaded.module.state_dict().values())
        console.print(f"{subject.loaded.path.name}: {parameters / 1e6:.0f} MB of weights as they are stored")

    with step(console, "optimize, and compare with float64"):
        job = explain_subject(subject, wish)
        job.report.render(console)

    with step(console, f"write kernels to ./{KERNELS}"):
        dump_job(job, parse_targets("sm_90,cpu"), KERNELS, console)

    with step(console, f"complete: {options.prompt}"):
        module = decoded_model(subject.loaded.module)
        ours = complete(job, tokenizer, options.prompt, options.tokens, SECONDS)
        eager = complete(module, tokenizer, options.prompt, options.tokens, math.inf)
        print_completions(console, ours, eager)


if __name__ == "__main__":
    main()
