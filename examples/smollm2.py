"""What the generate_*.py scripts share: SmolLM2 with a derived cache, its tokenizer, and the printing of a result.

Everything is made once per process, at its first use.
"""

import argparse
import functools
from collections.abc import Sequence

from torchweld import load_model
from torchweld.decoding.cached import CachedModel
from torchweld.decoding.generation import Generation
from torchweld.graph.capture_causal import capture_causal
from torchweld.graph.program import Program
from torchweld.models.load import LoadedModel
from torchweld.models.tokenizer import Tokenizer


@functools.cache
def loaded() -> LoadedModel:
    """SmolLM2-135M-Instruct, from its package."""
    return load_model("smollm2")


@functools.cache
def program() -> Program:
    """Its graph, captured without a cache."""
    return capture_causal(loaded().module)


@functools.cache
def cached_model() -> CachedModel:
    """Its step with the derived cache, compiled."""
    return CachedModel(program())


def tokenizer() -> Tokenizer:
    """Its own tokenizer."""
    found = loaded().tokenizer
    assert found is not None
    return found


def parser(description: str | None, prompt: str, tokens: int = 96) -> argparse.ArgumentParser:
    """A command line with --prompt and --tokens."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--prompt", default=prompt)
    made.add_argument("--tokens", type=int, default=tokens)
    return made


def parse(description: str | None, prompt: str, arguments: Sequence[str] | None) -> tuple[str, int]:
    """Prompt and number of tokens from the command line."""
    given = parser(description, prompt).parse_args(arguments)
    return given.prompt, given.tokens


def show(prompt: str, result: Generation) -> Generation:
    """Print the text and what it took; returns the result."""
    print(f"{prompt}{result.text}\n")
    counts = result.statistics
    print(f"{len(result.tokens)} tokens, {counts.passes} passes behind the prompt's own, {counts.rows} rows")
    print(f"{counts.drafted} guesses, {counts.accepted} of them accepted")
    return result
