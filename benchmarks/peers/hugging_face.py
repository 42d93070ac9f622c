"""Hugging Face models on torch: as they are (eager), and through torch.compile.

Generation feeds one token after another with the model's own cache (growing in eager mode, static when compiled, as
its guide advises), without a sampler: `generate` would add its own bookkeeping to every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.peers.inputs import ANSWER_NUMBERS, answer_prompt, answer_sentences, sentences, tokens
from benchmarks.peers.torch_runs import encode_seconds
from benchmarks.peers.twin import SentenceVectors, language_model, sentence_model
from benchmarks.workloads import Workload

_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Eager:
    """transformers and torch, nothing compiled."""

    def __init__(self, dtype: str) -> None:
        self._dtype = _TYPES[dtype]
        self._language: Any = None
        self._encoder: SentenceVectors | None = None

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        torch.set_num_threads(threads)
        if model == "minilm":
            self._encoder = sentence_model(self._dtype)
        else:
            self._language = language_model(model, self._dtype)
        return f"transformers {transformers.__version__}, torch {torch.__version__}, {threads} threads"

    @torch.no_grad()
    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`."""
        self.run(Workload(workload.model, workload.kind, workload.batch, min(workload.length, 16)))

    @torch.no_grad()
    def run(self, workload: Workload) -> float:
        """As `System.run`."""
        if workload.kind == "encode":
            assert self._encoder is not None
            return encode_seconds(self._encoder, workload)
        if workload.kind == "prefill":
            ids = torch.tensor(sentences(workload.batch, workload.length))
            start = time.perf_counter()
            self._language(input_ids=ids, logits_to_keep=1, use_cache=True)
            return time.perf_counter() - start
        cache = transformers.DynamicCache(config=self._language.config)

        def feed(ids: Tensor) -> object:
            return self._language(input_ids=ids, past_key_values=cache)

        return decode_seconds(feed, feed, workload)

    @torch.no_grad()
    def answer(self) -> list[float] | None:
        """As `System.answer`."""
        if self._language is not None:
            logits = self._language(input_ids=torch.tensor([answer_prompt()]), logits_to_keep=1).logits
            return [float(x) for x in logits.flatten()[:ANSWER_NUMBERS]]
        assert self._encoder is not None
        ids = torch.tensor(answer_sentences())
        return [float(x) for x in self._encoder(ids, torch.ones_like(ids))[0]]


class Compiled:
    """The same objects through torch.compile, a program for each shape (`dynamic=False`, its fastest).

    Decoding follows the guide of transformers: a static cache that is made once, the prompt not compiled, the step
    compiled with `dynamic=None` (a sliding cache counts in Python, which must not become a constant).

    mode: "default", or "max-autotune", which also freezes the weights into the program, as its CPU guide advises.
    """

    def __init__(self, dtype: str, mode: str) -> None:
        self._dtype, self._mode = _TYPES[dtype], mode
        self._language: Any = None
        self._encoder: SentenceVectors | None = None
        self._call: Callable[..., Any] | None = None
        self._step: Callable[..., Any] | None = None
        self._caches: dict[tuple[int, int], Any] = {}

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        torch.set_num_threads(threads)
        # one program per shape: nine shapes of sentences, two of a language model
        torch._dynamo.config.recompile_limit = 64
        freeze = self._mode != "default"
        torch._inductor.config.freezing = freeze
        if model == "minilm":
            self._encoder = sentence_model(self._dtype)
        else:
            self._language = language_model(model, self._dtype)
        target = self._encoder if self._language is None else self._language
        self._call = torch.compile(target, mode=self._mode, dynamic=False)
        self._step = torch.compile(target, mode=self._mode)
        frozen = ", freezing" if freeze else ""
        return f"torch {torch.__version__}, mode {self._mode}{frozen}, {threads} threads"

    @torch.no_grad()
    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`: compiles for exactly this shape."""
        self.run(workload)

    @torch.no_grad()
    def run(self, workload: Workload) -> float:
        """As `System.run`. The prompt's cache is not kept, which spares it some copying."""
        assert self._call is not None
        call = self._call
        if workload.kind == "encode":
            return encode_seconds(call, workload)
        if workload.kind == "prefill":
            ids = torch.tensor(sentences(workload.batch, workload.length))
            start = time.perf_counter()
            call(input_ids=ids, logits_to_keep=1, use_cache=False)
            return time.perf_counter() - start
        return self._decode(workload)

    def _decode(self, workload: Workload) -> float:
        assert self._step is not None
        step = self._step
        positions = max(workload.past, 1) + workload.length
        key = workload.batch, positions
        if key not in self._caches:
            self._caches[key] = transformers.StaticCache(
                config=self._language.config, max_cache_len=positions
            )
        cache = self._caches[key]
        cache.reset()
        return decode_seconds(
            lambda ids: self._language(input_ids=ids, past_key_values=cache),
            lambda ids: step(input_ids=ids, past_key_values=cache),
            workload,
        )

    @torch.no_grad()
    def answer(self) -> list[float] | None:
        """As `System.answer`."""
        assert self._call is not None
        if self._language is not None:
            ids = torch.tensor([answer_prompt()])
            logits = self._call(input_ids=ids, logits_to_keep=1, use_cache=False).logits
            return [float(x) for x in logits.flatten()[:ANSWER_NUMBERS]]
        ids = torch.tensor(answer_sentences())
        return [float(x) for x in self._call(ids, torch.ones_like(ids))[0]]


def decode_seconds(
    prompt: Callable[[Tensor], object], step: Callable[[Tensor], object], workload: Workload
) -> float:
    """Seconds of `length` steps with one token each, behind a prompt."""
    prompt(torch.tensor(sentences(workload.batch, max(workload.past, 1))))
    steps = [torch.full((workload.batch, 1), token) for token in tokens(workload.length, seed=7)]
    start = time.perf_counter()
    for ids in steps:
        step(ids)
    return time.perf_counter() - start
