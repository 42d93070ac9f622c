"""onnxruntime: MiniLM exported to ONNX, put through its own transformer optimizer; f32, and int8 (dynamic).

Settings of its documentation: all graph optimizations, fused BERT attention and layer norms, one thread per core, int8
weights per channel.
"""

from __future__ import annotations

import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import seconds_per_call
from benchmarks.peers.inputs import LEAST_SECONDS, answer_sentences, sentences
from benchmarks.peers.twin import sentence_model
from benchmarks.workloads import Workload

_OPSET = 17


class OnnxRuntime:
    """MiniLM in one session. precision: "f32" or "int8"."""

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._runtime: Any = import_module("onnxruntime")
        self._session: Any = None

    def load(self, model: str, threads: int) -> str:
        """As `System.load`."""
        with tempfile.TemporaryDirectory() as folder:
            path, fused = optimized_model(Path(folder))
            if self._precision == "int8":
                path = quantized_model(path)
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = threads
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
            self._session = self._runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        return f"onnxruntime {version('onnxruntime')}, {self._precision}, {fused}, {threads} threads"

    def prepare(self, workload: Workload) -> None:
        """As `System.prepare`."""
        self.run(workload)

    def run(self, workload: Workload) -> float:
        """As `System.run`."""
        feed = _feed(sentences(workload.batch, workload.length))
        self._session.run(None, feed)
        return seconds_per_call(lambda: self._session.run(None, feed), LEAST_SECONDS)

    def answer(self) -> list[float] | None:
        """As `System.answer`."""
        return [float(x) for x in self._session.run(None, _feed(answer_sentences()))[0][0]]


def _feed(batch: list[list[int]]) -> dict[str, Any]:
    ids = np.array(batch, dtype=np.int64)
    return {"ids": ids, "mask": np.ones_like(ids)}


def export_model(folder: Path) -> Path:
    """MiniLM as an ONNX file with free batch and length."""
    path = folder / "minilm.onnx"
    ids = torch.tensor(answer_sentences())
    free = {0: "batch", 1: "length"}
    torch.onnx.export(
        # spelled-out attention: the pattern that the optimizer knows
        sentence_model(torch.float32, "eager"), (ids, torch.ones_like(ids)), str(path),
        input_names=["ids", "mask"], output_names=["vectors"], opset_version=_OPSET, dynamo=False,
        dynamic_axes={"ids": free, "mask": free, "vectors": {0: "batch"}},
    )  # fmt: skip
    return path


def optimized_model(folder: Path) -> tuple[Path, str]:
    """The exported file with BERT's blocks fused, and what was fused, in words."""
    optimizer = import_module("onnxruntime.transformers.optimizer")
    exported = export_model(folder)
    config: Any = sentence_model(torch.float32).bert.config
    model = optimizer.optimize_model(
        str(exported), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    counts = model.get_fused_operator_statistics()
    path = folder / "optimized.onnx"
    model.save_model_to_file(str(path))
    return path, f"{counts.get('Attention', 0)} attentions fused"


def quantized_model(path: Path) -> Path:
    """The file with int8 weights per channel; activations are quantized at run time."""
    quantization = import_module("onnxruntime.quantization")
    target = path.with_name("int8.onnx")
    # the fused nodes are not in ONNX's own shape inference: say what their results are
    types = {"DefaultTensorType": import_module("onnx").TensorProto.FLOAT}
    quantization.quantize_dynamic(
        str(path),
        str(target),
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        extra_options=types,
    )
    return target
