"""llama.cpp through llama-cpp-python's low-level calls: `llama_decode` on the same GGUF file, no sampling.

Settings: its defaults (flash attention automatic, f16 cache, weights repacked where its build can), batches of 512 as
llama-bench has them, one thread per core, which is what is best for it on few cores.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

from benchmarks.peers.inputs import ANSWER_NUMBERS, answer_prompt, tokens
from benchmarks.workloads import Workload
from torchweld.models.builtin import find_builtin

CONTEXT = 1024


class LlamaCpp:
    """One model and one context."""

    def __init__(self) -> None:
        self._api: Any = import_module("llama_cpp")
        self._model: Any = None
        self._context: Any = None
        self._vocabulary = 0

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        api = self._api
        api.llama_backend_init()
        path = str(find_builtin(model)).encode()
        self._model = api.llama_model_load_from_file(path, api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.decode()}")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        return f"llama-cpp-python {version('llama-cpp-python')}, llama_decode, {threads} threads"

    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`."""
        self.run(Workload(workload.model, workload.kind, 1, min(workload.length, 16)))

    def run(self, workload: Workload) -> float:
        """As `System.run`."""
        self._forget()
        if workload.kind == "prefill":
            prompt = tokens(workload.length)
            start = time.perf_counter()
            self._decode(prompt)
            return time.perf_counter() - start
        self._decode(tokens(max(workload.past, 1)))
        steps = tokens(workload.length, seed=7)
        start = time.perf_counter()
        for token in steps:
            self._decode([token])
        return time.perf_counter() - start

    def answer(self) -> list[float] | None:
        """As `System.answer`."""
        self._forget()
        self._decode(answer_prompt())
        logits = self._api.llama_get_logits_ith(self._context, -1)
        return [float(logits[i]) for i in range(min(ANSWER_NUMBERS, self._vocabulary))]

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int]) -> None:
        """Feed tokens; logits of the last one only. Waits until they are there."""
        array = (self._api.llama_token * len(ids))(*ids)
        batch = self._api.llama_batch_get_one(
            ctypes.cast(array, ctypes.POINTER(self._api.llama_token)), len(ids)
        )
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        self._api.llama_synchronize(self._context)
