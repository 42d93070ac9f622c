"""Lookahead: the model computes n-grams for itself beside the text, and guesses from them.

python -m examples.generate_lookahead [--prompt TEXT] [--tokens N]
"""

from collections.abc import Sequence

from examples.smollm2 import cached_model, parse, show, tokenizer
from torchweld import generate
from torchweld.decoding.generation import Generation
from torchweld.decoding.lookahead import LookaheadProposer

PROMPT = "A short list of European countries and their capitals:\n1. France: Paris\n2. Spain:"


def main(arguments: Sequence[str] | None = None) -> Generation:
    """Generate with a window of two columns, trigrams, and two guesses: eight rows in every pass."""
    prompt, tokens = parse(__doc__, PROMPT, arguments)
    result = generate(
        cached_model(),
        prompt,
        tokenizer=tokenizer(),
        max_new_tokens=tokens,
        proposer=LookaheadProposer(window=2, ngram=3, guesses=2),
        num_assistant_tokens_schedule="constant",
    )
    return show(prompt, result)


if __name__ == "__main__":
    main()
