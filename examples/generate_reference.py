"""Inference with reference: guesses from a text that the answer is likely to copy from.

python -m examples.generate_reference [--prompt TEXT] [--reference TEXT] [--tokens N]
"""

from collections.abc import Sequence

from examples.smollm2 import cached_model, parser, show, tokenizer
from torchweld import generate
from torchweld.decoding.generation import Generation
from torchweld.decoding.reference import ReferenceProposer

REFERENCE = (
    "The Brooklyn Bridge is a hybrid cable-stayed and suspension bridge in New York City, spanning the East River "
    "between Manhattan and Brooklyn. It was opened on May 24, 1883."
)
PROMPT = f"Repeat this text word by word.\n\nText: {REFERENCE}\n\nThe same text again: The Brooklyn Bridge is"


def main(arguments: Sequence[str] | None = None) -> Generation:
    """Generate with at most fifteen guesses per pass, copied from the reference."""
    line = parser(__doc__, PROMPT, tokens=64)
    line.add_argument("--reference", default=REFERENCE)
    given = line.parse_args(arguments)
    codec = tokenizer()
    result = generate(
        cached_model(),
        given.prompt,
        tokenizer=codec,
        max_new_tokens=given.tokens,
        proposer=ReferenceProposer([codec.encode(given.reference)]),
        num_assistant_tokens=15,
    )
    return show(given.prompt, result)


if __name__ == "__main__":
    main()
