"""torchweld through its public names: `optimize` for encoders, the derived cache for language models."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import torch

import torchweld
from benchmarks.peers.inputs import ANSWER_NUMBERS, answer_prompt, answer_sentences, sentences, tokens
from benchmarks.peers.torch_runs import encode_seconds
from benchmarks.workloads import Workload
from torchweld.decoding.cached import CachedModel


def options_for(precision: str, threads: int | None) -> torchweld.Options:
    """Options with this precision of activations. ValueError where this build offers no such choice."""
    settings: dict[str, Any] = {"threads": threads}
    if "precision" in {field.name for field in fields(torchweld.Options)}:
        settings["precision"] = precision
    elif precision != "f32":
        raise ValueError(f"this build of torchweld has no precision {precision!r}: it computes in f32")
    return torchweld.Options(**settings)


class Torchweld:
    """One precision of ours."""

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._model: CachedModel | None = None
        self._encoder: torchweld.OptimizedModule | None = None

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        torch.set_num_threads(threads)
        options = options_for(self._precision, threads)
        loaded = torchweld.load_model(model)
        if loaded.kind == "decoder":
            self._model = CachedModel.from_module(loaded.module, options=options)
        else:
            self._encoder = torchweld.optimize(loaded.module, loaded.example_inputs, options=options)
        return f"torchweld {torchweld.__version__}, {self._precision}, {threads} threads"

    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`."""
        if workload.kind == "encode":
            self.run(workload)
        else:
            self.run(Workload(workload.model, workload.kind, workload.batch, min(workload.length, 16)))

    def run(self, workload: Workload) -> float:
        """As `System.run`."""
        if workload.kind == "encode":
            assert self._encoder is not None
            return encode_seconds(self._encoder, workload)
        assert self._model is not None
        prompts = sentences(workload.batch, workload.length)
        if workload.kind == "prefill":
            start = time.perf_counter()
            self._model.prefill(prompts)
            return time.perf_counter() - start
        return decode_seconds(self._model, workload)

    def answer(self) -> list[float] | None:
        """As `System.answer`."""
        if self._model is not None:
            logits = self._model.prefill([answer_prompt()])
            return [float(x) for x in logits.flatten()[:ANSWER_NUMBERS]]
        assert self._encoder is not None
        ids = torch.tensor(answer_sentences())
        vectors = self._encoder(ids, torch.ones_like(ids))
        return [float(x) for x in vectors[0]]


def decode_seconds(model: CachedModel, workload: Workload) -> float:
    """Seconds of `length` steps of one token per sequence behind `past` (at least one) cached ones."""
    model.prefill(sentences(workload.batch, max(workload.past, 1)))
    steps = [torch.full((workload.batch, 1), token) for token in tokens(workload.length, seed=7)]
    start = time.perf_counter()
    for ids in steps:
        model.step(ids)
    return time.perf_counter() - start
