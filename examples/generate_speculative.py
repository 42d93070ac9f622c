"""Speculative decoding with a draft made of the model itself: the layers that matter least are left out.

python -m examples.generate_speculative [--prompt TEXT] [--tokens N] [--drop LAYERS]
"""

from collections.abc import Sequence

import torch

from examples.smollm2 import cached_model, parser, program, show, tokenizer
from torchweld import generate
from torchweld.decoding.generation import Generation
from torchweld.decoding.self_draft import self_draft

PROMPT = "Q: What is the capital of France?\nA: Paris.\nQ: What is the capital of Italy?\nA:"


def main(arguments: Sequence[str] | None = None) -> Generation:
    """Choose the layers to leave out on the prompt, and generate with at most three guesses per pass."""
    line = parser(__doc__, PROMPT, tokens=48)
    line.add_argument("--drop", type=int, default=10)
    given = line.parse_args(arguments)
    draft = self_draft(program(), torch.tensor([tokenizer().encode(given.prompt)]), drop=given.drop)
    result = generate(
        cached_model(),
        given.prompt,
        tokenizer=tokenizer(),
        max_new_tokens=given.tokens,
        proposer=draft,
        num_assistant_tokens=3,
        num_assistant_tokens_schedule="constant",
    )
    return show(given.prompt, result)


if __name__ == "__main__":
    main()
