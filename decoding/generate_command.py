"""`torchweld generate`: load a model, decode with a strategy, stream the text, say how it went.

The text goes to stdout as it comes, everything else to stderr. Ctrl-C ends the text, not the program: what was found
out so far is still said.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TextIO

import torch
from rich.console import Console
from torch import Tensor

from torchweld.codegen.cpp_packed import Precision
from torchweld.decoding.cached import NotDecodable
from torchweld.decoding.chat import Message, render_chat
from torchweld.decoding.choose_strategy import (
    GUESSES,
    SCHEDULES,
    STRATEGIES,
    Draft,
    Sources,
    build_lookup,
    build_model,
    build_proposer,
    check_sources,
)
from torchweld.decoding.generate import stream
from torchweld.decoding.generation import Generation, Stream
from torchweld.decoding.greedy import LogitsModel
from torchweld.decoding.medusa import load_heads
from torchweld.decoding.plot_accepted import plot_accepted
from torchweld.decoding.recompute import RecomputeModel
from torchweld.decoding.show_statistics import (
    WIDTH,
    Readings,
    precision_of,
    print_table,
    read_statistics,
    summary,
    to_json,
)
from torchweld.decoding.step_model import DecodingError, Proposer, StepModel
from torchweld.decoding.step_source import StepSource
from torchweld.models.errors import ModelFileError
from torchweld.models.load import LoadedModel
from torchweld.models.tokenizer import Tokenizer
from torchweld.optimizer.commands.baseline import decoded_model
from torchweld.optimizer.commands.subject import (
    Subject,
    Wish,
    compile_subject,
    load_subject,
)
from torchweld.optimizer.compile import Compiled
from torchweld.optimizer.suggest import check_name

# Control characters but tab and line feed: a text must not move the cursor or speak to the terminal.
_UNSAFE: Final = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; all None: not at all, the most likely one is taken."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def do_sample(self) -> bool:
        """Was anything asked for that only sampling has?"""
        asked = self.temperature is not None and self.temperature > 0.0
        others = any(value is not None for value in (self.top_k, self.top_p, self.min_p))
        return asked or (others and self.temperature is None)


@dataclass(frozen=True)
class GenerateWish:
    """What the command line asked for.

    references: files. cache: decode with the derived cache, or recompute every position. eager: torch's own kernels,
    and no cache.
    """

    model: str
    prompt: str
    decode: str = "auto"
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    references: tuple[Path, ...] = ()
    draft: str | None = None
    heads: Path | None = None
    threads: int | None = None
    precision: Precision = "f32"
    eager: bool = False
    cache: bool = True
    as_json: bool = False
    table: bool = False
    plot: Path | None = None

    @property
    def machine(self) -> Wish:
        """What of it concerns the compiler; the same for the model and a draft."""
        return Wish(threads=self.threads, precision=self.precision)


@dataclass(frozen=True)
class Decoder:
    """A model, where its guesses come from, and the seconds it took to get there.

    compiled: the program that a pass runs, where there is one.
    """

    model: StepModel
    proposer: Proposer | None
    seconds: float
    compiled: Compiled | None = None


def run_generate(wish: GenerateWish, out: TextIO | None = None, error: TextIO | None = None) -> bool:
    """Generate as asked; False where Ctrl-C ended the text. Raises what `torchweld.optimizer.failures` explains.

    out, error: stdout and stderr unless given.
    """
    out, error = out or sys.stdout, error or sys.stderr
    check_name("strategy", wish.decode, STRATEGIES, "--decode")
    check_sources(wish.decode, wish.references, wish.draft, wish.heads)
    if wish.eager and wish.precision != "f32":
        raise DecodingError(f"--precision {wish.precision} is of our kernels; expected f32 with --eager")
    # whatever can be wrong is looked at before the model is, which takes seconds
    sources = Sources(
        references=tuple(read_text(path) for path in wish.references),
        heads=None if wish.heads is None else load_heads(wish.heads),
    )
    subject = load_subject(wish.model, wish.machine)
    tokenizer = language_tokenizer(subject.loaded, wish.model)
    ids = encode_prompt(tokenizer, wish)
    decoder = _build(subject, tokenizer, ids, wish, sources, error)
    pieces = stream_wish(decoder, tokenizer, ids, wish)
    finished = _write_all(pieces, None if wish.as_json else out)
    _report(pieces.generation(), decoder, wish, out, error)
    return finished


def read_text(path: Path) -> str:
    """A text file; DecodingError where it is no UTF-8. OSError where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DecodingError(f"{path} is no UTF-8 text (byte {error.start}); expected a text file") from None


def encode_prompt(tokenizer: Tokenizer, wish: GenerateWish) -> list[int]:
    """Tokens of the prompt, or of the conversation that begins with it. ModelFileError where there are none."""
    if wish.chat:
        first = [] if wish.system is None else [Message("system", wish.system)]
        text = render_chat(tokenizer, [*first, Message("user", wish.prompt)])
        return tokenizer.encode(text, rendered=True)
    if wish.system is not None:
        raise DecodingError("--system is a turn of a conversation; expected --chat with it")
    ids = tokenizer.encode(wish.prompt)
    if not ids:
        raise ModelFileError("prompt", "has no tokens", "some text")
    return ids


def language_tokenizer(loaded: LoadedModel, spec: str) -> Tokenizer:
    """The tokenizer of a causal language model; ModelFileError if it has none or is of another kind."""
    if loaded.kind != "decoder":
        raise ModelFileError(
            spec, f"is a {loaded.architecture} {loaded.kind}", "a language model such as smollm2"
        )
    if loaded.tokenizer is None:
        raise ModelFileError(spec, "has no tokenizer", "tokenizer.json beside the weights, or a GGUF file")
    return loaded.tokenizer


def recompute_model(call: Callable[[Tensor], object]) -> RecomputeModel:
    """A model without a cache as a StepModel; `call` takes ids int64 [1, S] and gives logits [1, S, V].

    It is run once on one token to see V. DecodingError where the result is no tensor.
    """

    def logits(ids: Tensor, /) -> Tensor:
        result = call(ids)
        if not isinstance(result, Tensor):
            raise DecodingError(f"the model returns a {type(result).__name__}; expected a tensor of logits")
        return result

    forward: LogitsModel = logits
    with torch.inference_mode():
        return RecomputeModel(forward, forward(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])


def _build(
    subject: Subject,
    tokenizer: Tokenizer,
    ids: list[int],
    wish: GenerateWish,
    sources: Sources,
    error: TextIO,
) -> Decoder:
    """The model and its proposer; without a cache, with the reason on `error`, where none can be derived."""
    begin = time.perf_counter()
    options = wish.machine.options()
    if wish.eager or not wish.cache:
        return _without_cache(subject, tokenizer, wish, sources, begin)
    source = StepSource.of_module(subject.loaded.module, options=options, phase=subject.phase)
    try:
        model = build_model(wish.decode, source, options)
    except NotDecodable as reason:
        print(f"{reason}; recomputing every position", file=error)
        return _without_cache(subject, tokenizer, wish, sources, begin)
    sources = replace(sources, draft=_load_draft(wish))
    with subject.phase("make guesses ready for"):
        proposer = build_proposer(wish.decode, model, source, tokenizer, sources, options, ids)
    if proposer is not None and proposer.row_counts is not None:
        model.compiled(is_tree=True)  # else the first pass with a tree would wait for it
    return Decoder(model, proposer, time.perf_counter() - begin, model.compiled())


def _without_cache(
    subject: Subject, tokenizer: Tokenizer, wish: GenerateWish, sources: Sources, begin: float
) -> Decoder:
    """Every pass runs over the whole text, so only guesses that cost nothing can pay."""
    if wish.decode not in ("auto", "plain", "lookup"):
        raise DecodingError(
            f"--decode {wish.decode} needs the cache; expected auto, plain or lookup without one"
        )
    job = None if wish.eager else compile_subject(subject, wish.machine)
    model = recompute_model(job or decoded_model(subject.loaded.module))
    proposer = None if wish.decode == "plain" else build_lookup(tokenizer, sources.references)
    return Decoder(model, proposer, time.perf_counter() - begin, None if job is None else job.compiled)


def _load_draft(wish: GenerateWish) -> Draft | None:
    if wish.draft is None:
        return None
    subject = load_subject(wish.draft, wish.machine)
    tokenizer = language_tokenizer(subject.loaded, wish.draft)
    options = wish.machine.options()
    source = StepSource.of_module(subject.loaded.module, options=options, phase=subject.phase)
    return Draft(build_model("draft", source, options), tokenizer)


def stream_wish(decoder: Decoder, tokenizer: Tokenizer, ids: list[int], wish: GenerateWish) -> Stream:
    """The pieces of the text behind `ids`, drawn and ended as the wish says."""
    drawn = wish.sampling
    return stream(
        decoder.model,
        ids,
        tokenizer=tokenizer,
        max_new_tokens=wish.max_new_tokens,
        do_sample=drawn.do_sample,
        temperature=1.0 if drawn.temperature is None else drawn.temperature,
        top_k=drawn.top_k,
        top_p=1.0 if drawn.top_p is None else drawn.top_p,
        min_p=0.0 if drawn.min_p is None else drawn.min_p,
        repetition_penalty=drawn.repetition_penalty,
        stop_strings=wish.stops,
        seed=drawn.seed,
        proposer=decoder.proposer,
        num_assistant_tokens=GUESSES.get(wish.decode),
        num_assistant_tokens_schedule=SCHEDULES.get(wish.decode, "adaptive"),
    )


def _write_all(pieces: Stream, out: TextIO | None) -> bool:
    """Write every piece as it comes, and a line feed; False where Ctrl-C came."""
    safe = out is not None and out.isatty()
    try:
        for piece in pieces:
            if out is not None and piece.text:
                out.write(piece.text.translate(_UNSAFE) if safe else piece.text)
                out.flush()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        pieces.close()
        if out is not None:
            out.write("\n")
            out.flush()


def _report(generation: Generation, decoder: Decoder, wish: GenerateWish, out: TextIO, error: TextIO) -> None:
    statistics = generation.statistics
    precision = precision_of(decoder.compiled)
    readings = Readings(statistics, precision=precision)
    if (wish.table or wish.as_json) and statistics.passes:
        readings = replace(read_statistics(statistics, decoder.model), precision=precision)
    if wish.as_json:
        content = {
            "model": wish.model,
            "text": generation.text,
            "tokens": list(generation.tokens),
            "finish": generation.finish or "interrupted",
            "stop_string": generation.stop_string,
            "ready_seconds": decoder.seconds,
            "statistics": to_json(readings),
        }
        print(json.dumps(content, indent=1, ensure_ascii=False), file=out)
    elif wish.table:
        print_table(readings, Console(file=error, width=WIDTH))
    else:
        how = "" if precision in (None, "f32") else f", {precision}"
        if isinstance(decoder.model, RecomputeModel):
            how += "; no cache: every pass read the whole text"
        print(summary(statistics) + how, file=error)
    if wish.plot is not None:
        wish.plot.write_text(plot_accepted(statistics, f"{wish.model}, {statistics.strategy}"), "utf-8")
