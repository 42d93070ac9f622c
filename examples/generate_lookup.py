"""Prompt lookup: guesses from what the text said before. It pays where texts repeat, as in edited code.

python -m examples.generate_lookup [--prompt TEXT] [--tokens N]
"""

from collections.abc import Sequence

from examples.smollm2 import cached_model, parse, show, tokenizer
from torchweld import generate
from torchweld.decoding.generation import Generation

PROMPT = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

# The same function, with a check for an empty list:
def mean(values):
"""


def main(arguments: Sequence[str] | None = None) -> Generation:
    """Generate with at most eight guesses per pass, as many as pay."""
    prompt, tokens = parse(__doc__, PROMPT, arguments)
    result = generate(
        cached_model(), prompt, tokenizer=tokenizer(), max_new_tokens=tokens, prompt_lookup_num_tokens=8
    )
    return show(prompt, result)


if __name__ == "__main__":
    main()
