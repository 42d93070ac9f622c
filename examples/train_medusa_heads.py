"""Train Medusa heads for SmolLM2 on its own greedy text; minutes on two cores.

    python -m examples.train_medusa_heads heads.safetensors [--texts N] [--tokens N] [--epochs N]
    python -m examples.generate_medusa --heads heads.safetensors

The model continues short beginnings of many kinds; every head learns to say, from the hidden state behind a token, the
token two, three, four places on. Only the heads learn; they share the model's output head.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

from examples.smollm2 import program, tokenizer
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.medusa import MedusaHeads, save_heads
from torchweld.decoding.train_medusa import record, train_heads

OPENINGS = (
    "The history of {} begins",
    "A short story about {}:\n\nOnce upon a time,",
    "Question: What should one know about {}?\nAnswer:",
    "The five most important facts about {} are:\n1.",
    "Dear friend, yesterday I read about {}. I",
    '# A Python function about {}\ndef describe(name):\n    """',
    "class {}:\n    def __init__(self,",
    "Explain {} to a child. First,",
)
SUBJECTS = (
    "water", "music", "bridges", "numbers", "the moon", "bread", "computers", "trees", "maps", "clocks", "birds",
    "law", "rivers", "sleep", "trade", "glass", "letters", "health", "steel", "gardens", "storms", "ships", "money",
    "languages", "light", "cities", "horses", "books", "sound", "mountains", "history", "work",
)  # fmt: skip


@functools.cache
def hidden_model() -> HiddenModel:
    """SmolLM2 with its hidden states in view."""
    return HiddenModel.from_program(program())


def train(texts: int, tokens: int, epochs: int) -> MedusaHeads:
    """Three heads, trained on `texts` continuations of `tokens` tokens; prints how they do on held-out text."""
    codec, model = tokenizer(), hidden_model()
    prompts = [codec.encode(o.format(s)) for s, o in itertools.product(SUBJECTS, OPENINGS)][:texts]
    # Prompts of equal length are read together.
    traces = record(model, sorted(prompts, key=len), tokens=tokens, eos=codec.eos)
    print(f"{sum(len(trace.tokens) for trace in traces)} tokens of {len(traces)} texts")
    assert model.head is not None
    begin = time.perf_counter()
    heads, fits = train_heads(traces, model.head, epochs=epochs, rows=128)
    print(f"trained in {time.perf_counter() - begin:.0f} s")
    for places, fit in enumerate(fits, start=1):
        print(f"head {places}: {fit.accuracy:.0%} of {fit.tokens} held-out tokens right, loss {fit.loss:.2f}")
    return heads


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("heads", type=Path)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args(arguments)
    save_heads(train(given.texts, given.tokens, given.epochs), given.heads)
    print(f"wrote {given.heads}")


if __name__ == "__main__":
    main()
