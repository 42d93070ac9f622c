"""The public `generate`: what can be asked for, what comes back, and requests without meaning."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import torchweld
from tests.decoding.guessing import FixedChain
from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.generate import generate, generate_batch, stream
from torchweld.decoding.generation import Piece
from torchweld.decoding.pass_costs import PassCosts
from torchweld.decoding.step_model import DecodingError

LETTERS = "abcdefghijkl"
COSTS = PassCosts((1, 17), (1.0, 1.1))
REPOSITORY = Path(__file__).resolve().parents[2]


class Letters:
    """One letter per token; the last one ends a text."""

    eos: tuple[int, ...] = (11,)

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in ids if token not in self.eos)

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(LETTERS)}


def model(seed: int = 0) -> ToyModel:
    return ToyModel(WholeText(12, seed))


def ways() -> list[dict[str, Any]]:
    """Every way to ask for guesses."""
    letters = Letters()
    return [
        {},
        {"prompt_lookup_num_tokens": 4, "costs": COSTS},
        {"assistant_model": model(), "assistant_tokenizer": letters, "costs": COSTS},
        {
            "assistant_model": model(1),
            "assistant_tokenizer": letters,
            "num_assistant_tokens": 3,
            "costs": COSTS,
        },
        {
            "assistant_model": model(),
            "assistant_tokenizer": letters,
            "num_assistant_tokens_schedule": "constant",
        },
        {"proposer": FixedChain([3, 4, 5]), "num_assistant_tokens_schedule": "constant"},
        {"proposer": FixedChain([3, 4, 5])},
    ]


@pytest.mark.parametrize("way", range(len(ways())))
def test_every_way_gives_the_same_text_tokens_and_probabilities(way: int) -> None:
    plain = generate(model(), "abc", tokenizer=Letters(), max_new_tokens=30, logprobs=True, eos_token_id=())
    got = generate(
        model(), "abc", tokenizer=Letters(), max_new_tokens=30, logprobs=True, eos_token_id=(), **ways()[way]
    )
    assert (got.tokens, got.text, got.logprobs, got.finish) == (
        plain.tokens,
        plain.text,
        plain.logprobs,
        "length",
    )
    assert len(plain.tokens) == 30 and plain.statistics.new_tokens == 30


@pytest.mark.parametrize("way", range(len(ways())))
@pytest.mark.parametrize("length", [1, 2, 3])
def test_stop_strings_end_a_text_wherever_a_draft_ends(way: int, length: int) -> None:
    """Every piece of the plain text is tried as the stop string; tokens, text and cache agree with plain decoding."""
    plain = generate(model(), "abc", tokenizer=Letters(), max_new_tokens=14, eos_token_id=())
    whole = plain.text
    assert whole is not None
    for start in range(len(whole) - length):
        stop = whole[start : start + length]
        target = model()
        got = generate(
            target,
            "abc",
            tokenizer=Letters(),
            max_new_tokens=14,
            eos_token_id=(),
            stop_strings=stop,
            **ways()[way],
        )
        end = whole.index(stop)
        assert got.text == whole[:end] and got.finish == "stop" and got.stop_string == stop
        assert got.tokens == plain.tokens[: len(got.tokens)]
        # The token that completes the stop string is the last one (the end token shows no text).
        assert Letters().decode(got.tokens) == whole[: end + length] and got.tokens[-1] != 11
        assert target.texts == [[0, 1, 2, *got.tokens[:-1]]]


def test_end_tokens_come_from_the_tokenizer_unless_given() -> None:
    for seed in range(30):
        free = generate(model(seed), "a", tokenizer=Letters(), max_new_tokens=40, eos_token_id=())
        if 11 in free.tokens[1:-1]:
            break
    ended = generate(model(seed), "a", tokenizer=Letters(), max_new_tokens=40)
    assert ended.finish == "eos"
    assert ended.tokens == free.tokens[: free.tokens.index(11) + 1]
    assert ended.text == Letters().decode(ended.tokens)
    first = free.tokens[0]
    assert generate(model(seed), [0], max_new_tokens=40, eos_token_id=first).tokens == (first,)
    assert generate(model(seed), [0], max_new_tokens=40, eos_token_id=[first, 3]).tokens == (first,)


def test_prompts_come_in_every_form() -> None:
    expected = generate(model(), [0, 1, 2], max_new_tokens=5)
    assert expected.text is None
    for prompt in (
        (0, 1, 2),
        torch.tensor([0, 1, 2]),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([0, 1, 2]).int(),
    ):
        assert generate(model(), prompt, max_new_tokens=5).tokens == expected.tokens
    assert generate(model(), "abc", tokenizer=Letters(), max_new_tokens=5).tokens == expected.tokens


def test_seeds_repeat_and_generators_go_on() -> None:
    def run(**values: Any) -> tuple[int, ...]:
        return generate(model(), [1], max_new_tokens=25, do_sample=True, **values).tokens

    assert run(seed=1) == run(seed=1) == run(generator=torch.Generator().manual_seed(1))
    assert run(seed=1) != run(seed=2)
    going = torch.Generator().manual_seed(1)
    assert run(generator=going) != run(generator=going)
    assert run() != run()


def test_pieces_stream_and_add_up() -> None:
    pieces: list[Piece] = []
    got = generate(
        model(), "abc", tokenizer=Letters(), max_new_tokens=20, stop_strings="zz", streamer=pieces.append
    )
    assert "".join(piece.text for piece in pieces) == got.text
    assert tuple(piece.token for piece in pieces) == got.tokens
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + [got.finish]


def test_a_stream_tells_at_any_time_what_came_so_far() -> None:
    target = model()
    pieces = stream(target, "abc", tokenizer=Letters(), max_new_tokens=20, eos_token_id=())
    assert pieces.generation().tokens == () and target.prefills == 0
    tokens = [next(pieces).token for _ in range(4)]
    so_far = pieces.generation()
    assert list(so_far.tokens) == tokens and so_far.finish is None and so_far.statistics.new_tokens == 4
    pieces.close()
    assert target.texts == [[0, 1, 2, *tokens[:-1]]]
    assert list(pieces) == []


def test_an_interrupt_in_the_streamer_leaves_the_cache_at_the_text() -> None:
    target, seen = model(), []

    def interrupt(piece: Piece) -> None:
        seen.append(piece.token)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(target, [0], streamer=interrupt, proposer=FixedChain([1, 2]), costs=COSTS)
    assert target.texts == [[0, *seen[:-1]]]


def test_a_batch_is_its_texts_alone() -> None:
    prompts = ["abc", "d", "efghi"]
    seen: list[tuple[int, int]] = []
    got = generate_batch(
        model(),
        prompts,
        tokenizer=Letters(),
        max_new_tokens=12,
        logprobs=True,
        streamer=lambda number, token: seen.append((number, token)),
    )
    for number, (prompt, text) in enumerate(zip(prompts, got, strict=True)):
        alone = generate(model(), prompt, tokenizer=Letters(), max_new_tokens=12, logprobs=True)
        assert (text.tokens, text.text, text.logprobs, text.finish) == (
            alone.tokens,
            alone.text,
            alone.logprobs,
            alone.finish,
        )
        assert [token for n, token in seen if n == number] == list(text.tokens)
    assert got[0].statistics.new_tokens == sum(len(text.tokens) for text in got)


def test_stop_strings_end_the_texts_of_a_batch_one_by_one() -> None:
    prompts = ["abc", "d", "efghi", "aaa"]
    values: dict[str, Any] = {"tokenizer": Letters(), "max_new_tokens": 12, "eos_token_id": ()}
    free = [generate(model(), prompt, **values).text or "" for prompt in prompts]
    stops = [free[0][2:4], free[2][5]]
    target = model()
    got = generate_batch(target, prompts, stop_strings=stops, **values)
    for prompt, text in zip(prompts, got, strict=True):
        alone = generate(model(), prompt, stop_strings=stops, **values)
        assert (text.tokens, text.text, text.finish, text.stop_string) == (
            alone.tokens,
            alone.text,
            alone.finish,
            alone.stop_string,
        )
    assert got[0].finish == got[2].finish == "stop"
    assert target.texts == [
        [*Letters().encode(prompt), *text.tokens[:-1]] for prompt, text in zip(prompts, got, strict=True)
    ]


def test_penalties_hold_with_guesses() -> None:
    values: dict[str, Any] = {"max_new_tokens": 30, "repetition_penalty": 1.8}
    plain = generate(ToyModel(Markov(9, 2)), [1], **values)
    for lookup in (1, 5):
        assert generate(
            ToyModel(Markov(9, 2)), [1], prompt_lookup_num_tokens=lookup, costs=COSTS, **values
        ).tokens == (plain.tokens)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "abc"}, "the prompt is text; give tokenizer="),
    ({"prompt": []}, "the prompt has no tokens"),
    ({"prompt": [99]}, "token 0 of the prompt is 99; expected 0 to 11"),
    ({"prompt": torch.zeros(2, 3, dtype=torch.int64)}, r"expected int64 \[S\] or \[1, S\]"),
    ({"prompt": torch.zeros(3)}, r"the prompt is torch.float32 \(3,\)"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"stop_strings": "a"}, "stop_strings need the text of tokens; give tokenizer="),
    ({"stop_strings": ["a", ""], "tokenizer": Letters()}, "an empty stop string"),
    ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
    ({"assistant_model": model()}, "without tokenizers nobody can tell"),
    (
        {"prompt_lookup_num_tokens": 3, "proposer": FixedChain([1])},
        "prompt_lookup_num_tokens and proposer are given; expected one source",
    ),
    ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens is 0"),
    ({"prompt_lookup_num_tokens": 3, "num_assistant_tokens": -1}, "num_assistant_tokens is -1"),
    ({"proposer": FixedChain([1]), "num_assistant_tokens_schedule": "often"}, "schedule is 'often'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_requests_without_meaning_are_refused_before_the_model_runs(
    values: dict[str, Any], message: str
) -> None:
    target = model()
    prompt = values.get("prompt", [1])
    rest = {name: value for name, value in values.items() if name != "prompt"}
    with pytest.raises(DecodingError, match=message):
        generate(target, prompt, **rest)
    assert target.prefills == 0


def test_a_module_is_refused_with_what_to_do() -> None:
    module: Any = torch.nn.Linear(2, 2)
    message = r"a Linear does not decode step by step; .*CachedModel\.from_module"
    with pytest.raises(DecodingError, match=message):
        generate(module, [1])
    with pytest.raises(DecodingError, match=message):
        generate_batch(module, [[1]])


def test_public_names() -> None:
    assert torchweld.generate is generate and torchweld.generate_batch is generate_batch
    code = "import sys, torchweld; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_the_beginning_of_a_stop_string_that_never_comes_is_given_out() -> None:
    whole = generate(model(), "abc", tokenizer=Letters(), max_new_tokens=6, eos_token_id=()).text
    assert whole
    held = generate(
        model(), "abc", tokenizer=Letters(), max_new_tokens=6, eos_token_id=(), stop_strings=whole[-1] + "\n"
    )
    assert held.text == whole and held.stop_string is None
