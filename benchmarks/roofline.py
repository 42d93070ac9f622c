"""The bytes and operations that a workload takes at least, and the time that the machine's ceilings allow for them.

facts = load_facts("smollm2")
work = least_work(facts, workload)                # weights as they are stored in the file
roofline_seconds(work, ceiling)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from benchmarks.workloads import Workload
from torchweld import load_model
from torchweld.models.bert import BertConfig, SentenceEncoder
from torchweld.models.gemma3 import Gemma3Config
from torchweld.models.layers import StoredLinear
from torchweld.models.llama import LlamaConfig


@dataclass(frozen=True)
class ModelFacts:
    """Sizes that decide what a model costs. `windows`: of each layer, None where it sees all earlier positions."""

    name: str
    body_weights: int
    head_weights: int
    stored_bytes: int
    windows: tuple[int | None, ...]
    heads: int
    kv_heads: int
    head_size: int
    causal: bool


@dataclass(frozen=True)
class Work:
    """Bytes that must be read from memory and operations (a multiply-add is two) of one run."""

    bytes: float
    flops: float

    def seconds(self, read_gb_s: float, gflops: float) -> float:
        """The roofline: whichever of the two takes longer."""
        return max(self.bytes / read_gb_s, self.flops / gflops) / 1e9


def least_work(
    facts: ModelFacts, workload: Workload, weight_bytes: float | None = None, kv_bytes: float = 4.0
) -> Work:
    """What one run takes at least.

    weight_bytes: per weight as this system keeps it, None for the file's own formats. kv_bytes: per cached value.
    Every weight is read once per step (once per run, if not decoding), cached keys and values once per step.
    """
    weights = facts.body_weights + facts.head_weights
    once = facts.stored_bytes if weight_bytes is None else weights * weight_bytes
    row = 2 * facts.kv_heads * facts.head_size * kv_bytes
    batch, length = workload.batch, workload.length
    if workload.kind in ("decode", "verify"):
        depths = range(workload.past + 1, workload.past + length + 1)
        seen = sum(_seen(window, depth) for window in facts.windows for depth in depths)
        # rows that are verified together share one reading of the weights and of the cache
        together = workload.kind == "verify"
        steps = 1 if together else length
        read = sum(_seen(window, workload.past + length) for window in facts.windows) if together else seen
        return Work(
            bytes=steps * once + batch * read * row,
            flops=batch * (2.0 * length * weights + 4.0 * facts.heads * facts.head_size * seen),
        )
    if facts.causal:
        seen = sum(_seen(window, depth) for window in facts.windows for depth in range(1, length + 1))
    else:
        seen = len(facts.windows) * length * length
    flops = 2.0 * length * facts.body_weights + 2.0 * facts.head_weights
    return Work(float(once), batch * (flops + 4.0 * facts.heads * facts.head_size * seen))


def _seen(window: int | None, depth: int) -> int:
    return depth if window is None else min(window, depth)


def facts_of(name: str, module: nn.Module) -> ModelFacts:
    """The sizes of a model that `load_model` made. TypeError for a kind of model that is not known here."""
    inner = module.bert if isinstance(module, SentenceEncoder) else module
    config = getattr(inner, "config", None)
    if type(config) not in _SHAPES:
        raise TypeError(
            f"model {name!r} has a {type(config).__name__}: expected one of {[*map(_name, _SHAPES)]}"
        )
    windows, heads, kv_heads, head_size = _SHAPES[type(config)](config)
    linears = {path: part for path, part in module.named_modules() if isinstance(part, StoredLinear)}
    head = linears.pop("lm_head", None)
    stored = sum(part.weight.nbytes for part in linears.values())
    return ModelFacts(
        name=name,
        body_weights=sum(map(_weights, linears.values())),
        head_weights=0 if head is None else _weights(head),
        stored_bytes=stored + (0 if head is None else head.weight.nbytes),
        windows=windows,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        causal=not isinstance(config, BertConfig),
    )


def load_facts(model: str) -> ModelFacts:
    """The sizes of a model by its name or path. Raises ModelFileError where it cannot be loaded."""
    return facts_of(model, load_model(model).module)


def _weights(linear: StoredLinear) -> int:
    return int(linear.weight.shape[0]) * linear.columns


def _name(kind: type) -> str:
    return kind.__name__


Shape = tuple[tuple[int | None, ...], int, int, int]


def _llama(config: LlamaConfig) -> Shape:
    return (None,) * config.layers, config.heads, config.kv_heads, config.head_size


def _gemma3(config: Gemma3Config) -> Shape:
    windows = tuple(None if is_global else config.window for is_global in config.is_global)
    return windows, config.heads, config.kv_heads, config.head_size


def _bert(config: BertConfig) -> Shape:
    return (None,) * config.layers, config.heads, config.heads, config.hidden // config.heads


_SHAPES: Mapping[type, Callable[..., Shape]] = {LlamaConfig: _llama, Gemma3Config: _gemma3, BertConfig: _bert}
