"""OpenVINO GenAI on the same GGUF file: its own pipeline, greedy, fresh prompts (it remembers prefixes).

It has no call for one step, so times are its own counts: time to the first token, and the times at which tokens came.
A greedy choice among the logits is inside both.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from itertools import count
from typing import Any

import numpy as np

from benchmarks.peers.inputs import tokens
from benchmarks.workloads import Workload
from torchweld.models.builtin import find_builtin


class OpenVinoGenAI:
    """One pipeline with the settings that it chooses itself, and a number of threads."""

    def __init__(self) -> None:
        self._openvino: Any = import_module("openvino")
        self._genai: Any = import_module("openvino_genai")
        self._pipeline: Any = None
        self._seeds = count(1 << 20)

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        self._pipeline = self._genai.LLMPipeline(
            str(find_builtin(model)), "CPU", INFERENCE_NUM_THREADS=threads
        )
        return f"openvino-genai {version('openvino-genai')}, its defaults (activations quantized), {threads} threads"

    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`."""
        self.run(Workload(workload.model, workload.kind, 1, min(workload.length, 16)))

    def run(self, workload: Workload) -> float:
        """As `System.run`."""
        if workload.kind == "prefill":
            times = self._generate(workload.length, 1)
            return float(times.get_ttft().mean) / 1e3
        # the first token belongs to the prompt: one more than there are steps
        times = self._generate(max(workload.past, 1), workload.length + 1)
        came = times.raw_metrics.m_new_token_times  # milliseconds
        if len(came) != workload.length + 1:
            raise RuntimeError(f"OpenVINO GenAI made {len(came)} tokens instead of {workload.length + 1}")
        return float(came[-1] - came[0]) / 1e3

    def answer(self) -> list[float] | None:
        """None: the pipeline gives tokens, no logits."""
        return None

    def _generate(self, length: int, new_tokens: int) -> Any:
        """Its counts of one generation behind a prompt that it has not seen."""
        ids = np.array([tokens(length, seed=next(self._seeds))], dtype=np.int64)
        prompt = self._genai.TokenizedInputs(
            self._openvino.Tensor(ids), self._openvino.Tensor(np.ones_like(ids))
        )
        settings = self._genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = new_tokens, True, False
        settings.apply_chat_template = False
        return self._pipeline.generate(prompt, settings).perf_metrics
