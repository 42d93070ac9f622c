"""Medusa: trained heads guess a tree of next tokens, which one pass verifies.

    python -m examples.train_medusa_heads heads.safetensors
    python -m examples.generate_medusa --heads heads.safetensors [--prompt TEXT] [--tokens N]

Without --heads a few texts train heads on the spot: right output, but hardly a guess accepted.
"""

from collections.abc import Sequence

from examples.smollm2 import parser, show, tokenizer
from examples.train_medusa_heads import hidden_model, train
from torchweld import generate
from torchweld.decoding.generation import Generation
from torchweld.decoding.medusa import MedusaProposer, load_heads

PROMPT = "The five most important facts about bridges are:\n1."


def main(arguments: Sequence[str] | None = None) -> Generation:
    """Load or train heads, and generate with a tree of eight guesses in every pass."""
    line = parser(__doc__, PROMPT, tokens=64)
    line.add_argument("--heads", help="file that train_medusa_heads wrote")
    given = line.parse_args(arguments)
    heads = train(texts=8, tokens=12, epochs=2) if given.heads is None else load_heads(given.heads)
    model = hidden_model()
    result = generate(
        model,
        given.prompt,
        tokenizer=tokenizer(),
        max_new_tokens=given.tokens,
        proposer=MedusaProposer(model, heads),
        num_assistant_tokens_schedule="constant",
    )
    return show(given.prompt, result)


if __name__ == "__main__":
    main()
