"""Who takes part: one line per system, with the settings that its own people would choose.

A system is a module of this folder with a class that satisfies `System`; the class is made in the worker process,
so that this table costs no import. To add one: one file, one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from benchmarks.workloads import Workload

Arithmetic = Literal["f32", "bf16", "int8"]
LANGUAGE: Final = ("smollm2", "gemma3")
MODELS: Final = (*LANGUAGE, "minilm")


class System(Protocol):
    """What a worker runs. Every method may raise anything: the reason goes into the table."""

    def load(self, model: str, threads: int) -> str:
        """Load a built-in model; one line that says version and settings."""

    def prepare(self, workload: Workload) -> None:
        """Compile and warm up, untimed."""

    def run(self, workload: Workload) -> float:
        """Seconds of one run."""

    def answer(self) -> list[float] | None:
        """Numbers that other systems must find too (`benchmarks.peers.inputs`), or None where none can be had."""


@dataclass(frozen=True)
class SystemSpec:
    """One system. place: module and class. arithmetic: of its activations. requires: packages that must be there.

    weight_bytes: per weight as it keeps them, None for the file's own formats; kv_bytes: per value in its cache.
    slow: minutes of preparation, so `--quick` leaves it out.
    """

    name: str
    place: str
    models: tuple[str, ...]
    arithmetic: Arithmetic
    weight_bytes: float | None
    kv_bytes: float
    settings: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    slow: bool = False

    @property
    def ours(self) -> bool:
        """Whether this is torchweld."""
        return self.name.startswith("torchweld")


def _ours(precision: Arithmetic) -> SystemSpec:
    return SystemSpec(
        f"torchweld {precision}", "benchmarks.peers.ours:Torchweld", MODELS, precision, None, 4.0,
        {"precision": precision},
    )  # fmt: skip


def _torch(
    name: str, kind: str, dtype: Arithmetic, models: tuple[str, ...] = MODELS, **settings: str
) -> SystemSpec:
    size = {"f32": 4.0, "bf16": 2.0, "int8": 1.0}[dtype]
    return SystemSpec(
        f"{name} {dtype}", f"benchmarks.peers.hugging_face:{kind}", models, dtype, size, size,
        {"dtype": dtype, **settings}, ("transformers",), slow=kind == "Compiled",
    )  # fmt: skip


_AUTOTUNED = "torch.compile max-autotune freezing"

SYSTEMS: Final = (
    _ours("f32"),
    _ours("bf16"),
    _ours("int8"),
    SystemSpec(
        "llama.cpp", "benchmarks.peers.llama_cpp:LlamaCpp", LANGUAGE, "int8", None, 2.0, {}, ("llama_cpp",)
    ),
    _torch("eager", "Eager", "f32"),
    _torch("eager", "Eager", "bf16"),
    _torch("torch.compile", "Compiled", "bf16", mode="default"),
    _torch(_AUTOTUNED, "Compiled", "bf16", mode="max-autotune"),
    # language models in f32 lose to bf16 at everything, after minutes of compiling
    _torch("torch.compile", "Compiled", "f32", ("minilm",), mode="default"),
    _torch(_AUTOTUNED, "Compiled", "f32", ("minilm",), mode="max-autotune"),
    SystemSpec(
        "onnxruntime f32", "benchmarks.peers.onnx_runtime:OnnxRuntime", ("minilm",), "f32", 4.0, 4.0,
        {"precision": "f32"}, ("onnx", "onnxruntime", "transformers"),
    ),
    SystemSpec(
        "onnxruntime int8", "benchmarks.peers.onnx_runtime:OnnxRuntime", ("minilm",), "int8", 1.0, 4.0,
        {"precision": "int8"}, ("onnx", "onnxruntime", "transformers"),
    ),
    SystemSpec(
        "OpenVINO f32", "benchmarks.peers.open_vino:OpenVino", ("minilm",), "f32", 4.0, 4.0,
        {"precision": "f32"}, ("openvino", "transformers"),
    ),
    SystemSpec(
        "OpenVINO auto", "benchmarks.peers.open_vino:OpenVino", ("minilm",), "bf16", 2.0, 4.0,
        {"precision": "auto"}, ("openvino", "transformers"),
    ),
    SystemSpec(
        "OpenVINO GenAI", "benchmarks.peers.open_vino_genai:OpenVinoGenAI", LANGUAGE, "int8", None, 1.0,
        {}, ("openvino", "openvino_genai"),
    ),
)  # fmt: skip


def chosen_systems(names: str | None, models: tuple[str, ...]) -> tuple[SystemSpec, ...]:
    """The systems that take any of the models; of them those whose name begins with one of the comma-separated names.

    Raises ValueError for a name that no system begins with.
    """
    able = tuple(spec for spec in SYSTEMS if set(spec.models) & set(models))
    if names is None:
        return able
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(spec.name.lower().startswith(name) for spec in SYSTEMS):
            raise ValueError(f"unknown system {name!r}: known are {', '.join(spec.name for spec in SYSTEMS)}")
    return tuple(spec for spec in able if any(spec.name.lower().startswith(name) for name in wanted))
