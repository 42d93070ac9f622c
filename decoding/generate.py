"""`generate(model, prompt, ...)`: text behind a prompt, with Hugging Face's names for what can be asked.

    generate(model, [1, 2, 3], max_new_tokens=20).tokens
    generate(model, "def main():", tokenizer=tokenizer, do_sample=True, temperature=0.7, seed=1).text
    generate(model, prompt, tokenizer=tokenizer, prompt_lookup_num_tokens=10)             guesses from the text itself
    generate(model, prompt, tokenizer=tokenizer, assistant_model=draft, assistant_tokenizer=tokenizer)
    generate(model, prompt, proposer=LookaheadProposer())                                 any other source of guesses

    for piece in stream(model, prompt, tokenizer=tokenizer): print(piece.text, end="")    as it comes
    generate_batch(model, prompts, max_new_tokens=20)                                     several texts at once

Guesses change how fast the text comes, never which text: without sampling it is the one of plain decoding, with
sampling it has the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from torchweld.decoding.autoregressive import decode_plain
from torchweld.decoding.chance import Chance, Dice
from torchweld.decoding.controller import Controller
from torchweld.decoding.draft_model import DraftModel
from torchweld.decoding.generation import Codec, Generation, Piece, Stream, TextSoFar
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.pass_costs import PassCosts, costs_of
from torchweld.decoding.request import Request, check_request
from torchweld.decoding.speculative import Constant, Policy, speculate
from torchweld.decoding.statistics import PassLog
from torchweld.decoding.step_model import DecodingError, Proposer, StepModel
from torchweld.decoding.warp import Warp

Schedule = Literal["adaptive", "constant"]
DEFAULT_GUESSES: Final = 15
"""Guesses at most per pass: 16 rows, as many as any precision computes alike."""


def generate(
    model: StepModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    streamer: Callable[[Piece], object] | None = None,
    tokenizer: Codec | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Collection[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    logprobs: bool = False,
    assistant_model: StepModel | None = None,
    assistant_tokenizer: Codec | None = None,
    prompt_lookup_num_tokens: int | None = None,
    proposer: Proposer | None = None,
    num_assistant_tokens: int | None = None,
    num_assistant_tokens_schedule: Schedule = "adaptive",
    costs: PassCosts | None = None,
) -> Generation:
    """Generate behind `prompt` (text, tokens, or int64 [S] or [1, S]); the model starts over with it.

    streamer: called with every piece as it comes. eos_token_id: tokens that end the text, given out; None means the
    tokenizer's; () means none. stop_strings: texts (need a tokenizer) before which the text ends. seed, generator: for
    sampling; without either every call differs. For temperature, top_k and the like see `Warp`.
    At most one source of guesses: a smaller model with the same vocabulary, prompt lookup, or any `Proposer`.
    num_assistant_tokens: guesses at most per pass. num_assistant_tokens_schedule: "adaptive" gives every pass as many
    as pay, by the measured costs of passes (`costs`, else measured once per model, which starts it over); "constant"
    always the most.
    Raises DecodingError for a request without meaning, and names what was expected; errors of the model pass through.
    """
    pieces = stream(
        model,
        prompt,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token_id=eos_token_id,
        stop_strings=stop_strings,
        seed=seed,
        generator=generator,
        logprobs=logprobs,
        assistant_model=assistant_model,
        assistant_tokenizer=assistant_tokenizer,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        proposer=proposer,
        num_assistant_tokens=num_assistant_tokens,
        num_assistant_tokens_schedule=num_assistant_tokens_schedule,
        costs=costs,
    )
    try:
        for piece in pieces:
            if streamer is not None:
                streamer(piece)
    finally:
        pieces.close()
    return pieces.generation()


def stream(
    model: StepModel,
    prompt: str | Sequence[int] | Tensor,
    *,
    tokenizer: Codec | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Collection[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    logprobs: bool = False,
    assistant_model: StepModel | None = None,
    assistant_tokenizer: Codec | None = None,
    prompt_lookup_num_tokens: int | None = None,
    proposer: Proposer | None = None,
    num_assistant_tokens: int | None = None,
    num_assistant_tokens_schedule: Schedule = "adaptive",
    costs: PassCosts | None = None,
) -> Stream:
    """As `generate`, piece by piece. The request is checked at once; the model runs when a piece is asked for."""
    _check_model(model)
    warp = Warp(do_sample, temperature, top_k, top_p, min_p, repetition_penalty)
    eos = _end_tokens(eos_token_id, tokenizer)
    request = Request(_tokens(prompt, tokenizer), max_new_tokens, eos, warp, logprobs)
    check_request(request, model)
    text = TextSoFar(tokenizer, _stop_strings(stop_strings, tokenizer), logprobs)
    chance, log = _chance(seed, generator), PassLog()
    source = _source_of_guesses(
        model, assistant_model, assistant_tokenizer, tokenizer, prompt_lookup_num_tokens, proposer
    )
    if source is None:
        return Stream(decode_plain(model, [request], chance=chance, log=log), log, text)
    most = num_assistant_tokens or prompt_lookup_num_tokens or DEFAULT_GUESSES
    policy = _policy(model, source, most, num_assistant_tokens_schedule, costs)
    given = speculate(model, request, source, policy=policy, chance=chance, log=log)
    return Stream(given, log, text)


def generate_batch(
    model: StepModel,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor,
    *,
    streamer: Callable[[int, int], object] | None = None,
    tokenizer: Codec | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Collection[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    logprobs: bool = False,
) -> tuple[Generation, ...]:
    """Generate behind several prompts of any lengths at once, by plain decoding; arguments as for `generate`.

    streamer: called with the number of the text and its new token. A text that has ended is fed nothing more.
    """
    _check_model(model)
    warp = Warp(do_sample, temperature, top_k, top_p, min_p, repetition_penalty)
    eos = _end_tokens(eos_token_id, tokenizer)
    requests = [Request(_tokens(p, tokenizer), max_new_tokens, eos, warp, logprobs) for p in prompts]
    stops = _stop_strings(stop_strings, tokenizer)
    log = PassLog()
    texts = [TextSoFar(tokenizer, stops, logprobs) for _ in requests]

    def is_stopped(number: int, token: int) -> bool:
        return texts[number].push(token)

    chance = _chance(seed, generator)
    for given in decode_plain(model, requests, chance=chance, log=log, is_stopped=is_stopped):
        texts[given.sequence].note(given)
        if streamer is not None:
            streamer(given.sequence, given.token)
    statistics = log.freeze(sum(len(text.tokens) for text in texts))
    return tuple(text.generation(statistics) for text in texts)


def _check_model(model: object) -> None:
    """DecodingError for what has no cache, with what makes one of it."""
    if not all(hasattr(model, name) for name in ("prefill", "step", "truncate", "keep")):
        raise DecodingError(
            f"a {type(model).__name__} does not decode step by step; make a model with a cache of it, once: "
            "torchweld.CachedModel.from_module(model)"
        )


def _tokens(prompt: str | Sequence[int] | Tensor, codec: Codec | None) -> tuple[int, ...]:
    """Tokens of one prompt, however it was given."""
    if isinstance(prompt, str):
        if codec is None:
            raise DecodingError("the prompt is text; give tokenizer=, or the prompt as tokens")
        return tuple(codec.encode(prompt))
    if isinstance(prompt, Tensor):
        one = prompt.dim() == 1 or (prompt.dim() == 2 and prompt.shape[0] == 1)
        if not one or prompt.dtype not in (torch.int64, torch.int32):
            given = f"{prompt.dtype} {tuple(prompt.shape)}"
            raise DecodingError(
                f"the prompt is {given}; expected int64 [S] or [1, S] (generate_batch takes more)"
            )
        return tuple(prompt.reshape(-1).tolist())
    return tuple(map(int, prompt))


def _end_tokens(eos_token_id: int | Collection[int] | None, codec: Codec | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset() if codec is None else frozenset(codec.eos)
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _stop_strings(stops: str | Iterable[str] | None, codec: Codec | None) -> tuple[str, ...]:
    wanted = () if stops is None else (stops,) if isinstance(stops, str) else tuple(stops)
    if wanted and codec is None:
        raise DecodingError("stop_strings need the text of tokens; give tokenizer=")
    if "" in wanted:
        raise DecodingError("an empty stop string would end every text at once; expected some characters")
    return wanted


def _chance(seed: int | None, generator: torch.Generator | None) -> Chance:
    if seed is not None and generator is not None:
        raise DecodingError("seed and generator are both given; expected one of them")
    return Dice(seed, generator)


def _source_of_guesses(
    model: StepModel,
    assistant: StepModel | None,
    assistant_tokenizer: Codec | None,
    tokenizer: Codec | None,
    lookup: int | None,
    proposer: Proposer | None,
) -> Proposer | None:
    """The one source of guesses that was asked for, if any."""
    asked = {"assistant_model": assistant, "prompt_lookup_num_tokens": lookup, "proposer": proposer}
    names = [name for name, value in asked.items() if value is not None]
    if len(names) > 1:
        raise DecodingError(f"{' and '.join(names)} are given; expected one source of guesses at most")
    if assistant is not None:
        return DraftModel.checked(assistant, model.vocab_size, tokenizer, assistant_tokenizer)
    if lookup is not None:
        if lookup < 1:
            raise DecodingError(f"prompt_lookup_num_tokens is {lookup}; expected at least 1")
        return LookupProposer(tokens=lookup)
    return proposer


def _policy(
    model: StepModel, proposer: Proposer, most: int, schedule: Schedule, costs: PassCosts | None
) -> Policy:
    """How many guesses every pass gets."""
    if most < 1:
        raise DecodingError(f"num_assistant_tokens is {most}; expected at least 1")
    if schedule == "constant":
        return Constant(most if proposer.row_counts is None else max(proposer.row_counts))
    if schedule != "adaptive":
        raise DecodingError(
            f'num_assistant_tokens_schedule is {schedule!r}; expected "adaptive" or "constant"'
        )
    guess_seconds = costs_of(proposer.model).seconds[0] if isinstance(proposer, DraftModel) else None
    costs = costs or costs_of(model)
    return Controller(costs, most=most, row_counts=proposer.row_counts, guess_seconds=guess_seconds)
