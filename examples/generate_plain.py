"""Plain decoding: one token per pass, printed as it comes; then the same prompt, sampled.

python -m examples.generate_plain [--prompt TEXT] [--tokens N]
"""

from collections.abc import Sequence

from examples.smollm2 import cached_model, parse, show, tokenizer
from torchweld import generate
from torchweld.decoding.generation import Generation

PROMPT = "The three most important inventions of the last century are"


def main(arguments: Sequence[str] | None = None) -> Generation:
    """Generate greedily while printing, then with temperature and top-p."""
    prompt, tokens = parse(__doc__, PROMPT, arguments)
    greedy = generate(
        cached_model(),
        prompt,
        tokenizer=tokenizer(),
        max_new_tokens=tokens,
        streamer=lambda piece: print(piece.text, end="", flush=True),
    )
    print("\n\nsampled:")
    sampled = generate(
        cached_model(),
        prompt,
        tokenizer=tokenizer(),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        seed=0,
    )
    show(prompt, sampled)
    return greedy


if __name__ == "__main__":
    main()
