"""OpenVINO: MiniLM converted from torch, compiled for each shape; f32, and the precision that it chooses itself.

Settings: latency hint, one stream, fixed shapes (its fastest). "auto" is its default: bf16 where the CPU has it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks.measure import seconds_per_call
from benchmarks.peers.inputs import ANSWER_TOKENS, LEAST_SECONDS, answer_sentences, sentences
from benchmarks.peers.twin import sentence_model
from benchmarks.workloads import Workload


class OpenVino:
    """MiniLM, one compiled model per shape. precision: "f32" or "auto"."""

    def __init__(self, precision: str) -> None:
        self._openvino: Any = import_module("openvino")
        self._core: Any = self._openvino.Core()
        self._settings: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if precision == "f32":
            self._settings["INFERENCE_PRECISION_HINT"] = "f32"
        self._model: Any = None
        self._requests: dict[tuple[int, int], Any] = {}

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        ids = torch.tensor(answer_sentences())
        with torch.no_grad():
            self._model = self._openvino.convert_model(
                sentence_model(torch.float32), example_input=(ids, torch.ones_like(ids))
            )
        self._settings["INFERENCE_NUM_THREADS"] = threads
        compiled = self._request(2, ANSWER_TOKENS).get_compiled_model()
        kind = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        return f"openvino {version('openvino')}, computes in {kind}, {threads} threads"

    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`."""
        self.run(workload)

    def run(self, workload: Workload) -> float:
        """As `System.run`."""
        request = self._request(workload.batch, workload.length)
        inputs = _inputs(sentences(workload.batch, workload.length))
        request.infer(inputs)
        return seconds_per_call(lambda: request.infer(inputs, share_inputs=True), LEAST_SECONDS)

    def answer(self) -> list[float] | None:
        """As `System.answer`."""
        results = self._request(2, ANSWER_TOKENS).infer(_inputs(answer_sentences()))
        return [float(x) for x in results[0][0]]

    def _request(self, batch: int, length: int) -> Any:
        if (batch, length) not in self._requests:
            self._model.reshape(dict.fromkeys((0, 1), self._openvino.PartialShape([batch, length])))
            self._requests[batch, length] = self._core.compile_model(
                self._model, "CPU", self._settings
            ).create_infer_request()
        return self._requests[batch, length]


def _inputs(batch: list[list[int]]) -> list[Any]:
    ids = np.array(batch, dtype=np.int64)
    return [ids, np.ones_like(ids)]
