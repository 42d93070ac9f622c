"""Build a random program step by step: every operation is run as it is added, so shapes and values are known.

Running while building replaces shape rules and interval arithmetic: an operation whose operands it cannot
take is dropped (`Rejected`), and so is one whose result is not finite or too large. What remains is tame by
construction.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from tests.generators.choosing import Chooser, chance, pick
from tests.generators.tensors import TensorSpec

_Item = TypeVar("_Item")

SIZES = (1, 2, 3, 5, 7, 13, 17, 31, 33)
_LARGEST = 200.0  # results beyond it are dropped: far from the float16 limit even after a sum
_SEEDS = 10_000


class Rejected(Exception):
    """The operation does not suit the values at hand; the builder goes on without it."""


class Size(int):
    """A size that stands for a dimension of the first input, so that a symbolic program can ask for it
    again."""

    dim: int

    def __new__(cls, value: int, dim: int) -> Size:
        size = super().__new__(cls, value)
        size.dim = dim
        return size


@dataclass(frozen=True)
class Ref:
    """An argument that is the value of this name."""

    name: str


@dataclass(frozen=True)
class Step:
    """One call: `name = target(*args, **kwargs)`; `kind` is what the coverage counts."""

    name: str
    kind: str
    target: Callable[..., object]
    args: tuple[object, ...]
    kwargs: tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Value:
    """A tensor of the program. `exact`: float32 and float64 runs agree on every bit, so floor and == are
    safe."""

    name: str
    tensor: Tensor
    exact: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def is_float(self) -> bool:
        return self.tensor.is_floating_point()

    @property
    def low(self) -> float:
        return float(self.tensor.min()) if self.tensor.numel() else 0.0

    @property
    def high(self) -> float:
        return float(self.tensor.max()) if self.tensor.numel() else 0.0


@dataclass
class Builder:
    """The program so far. `stream` is the residual stream [batch, tokens, width] that the structures read and
    write."""

    chooser: Chooser
    dtype: torch.dtype
    batch: Size
    tokens: Size
    heads: int
    kv_heads: int
    head_width: int
    symbolic: bool = False
    inputs: list[TensorSpec] = field(default_factory=list)
    weights: list[TensorSpec] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    made: dict[str, Tensor] = field(default_factory=dict)
    stream: Value = field(init=False)

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    def pick(self, *items: _Item) -> _Item:
        return pick(self.chooser, items)

    def chance(self, percent: int) -> bool:
        return chance(self.chooser, percent)

    def size(self, low: int = 1) -> int:
        """Return a size of at least `low` from SIZES."""
        return pick(self.chooser, [s for s in SIZES if s >= low])

    def add_input(self, spec: TensorSpec) -> Value:
        self.inputs.append(spec)
        return self._add_tensor(spec)

    def add_weight(self, spec: TensorSpec) -> Value:
        self.weights.append(spec)
        return self._add_tensor(spec)

    def input_name(self) -> str:
        return f"x{len(self.inputs)}"

    def weight_name(self) -> str:
        return f"w{len(self.weights)}"

    def seed(self) -> int:
        return self.chooser.integer(0, _SEEDS)

    def weight(
        self,
        *shape: int,
        low: float | None = None,
        high: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> Value:
        """Return a weight of `shape`: without bounds one that keeps the magnitude of what it is multiplied
        with.

        Now and then an earlier weight of the same shape and bounds comes back: real models tie weights.
        """
        scale = (3.0 / max(shape[-1] if shape else 1, 1)) ** 0.5
        low, high = (-scale if low is None else low), (scale if high is None else high)
        dtype = dtype or self.dtype
        for old in self.weights:
            if (old.shape, old.dtype, old.low, old.high) == (shape, dtype, low, high) and self.chance(15):
                return self.find(old.name)
        layout = "transposed" if len(shape) == 2 and self.chance(10) else "contiguous"
        return self.add_weight(TensorSpec(self.weight_name(), shape, dtype, self.seed(), low, high, layout))

    def ids(self, count: int, *shape: int) -> Value:
        """Return a constant of int64 indices below `count`."""
        if count < 1:
            raise Rejected("no index into an empty dimension")
        return self.add_weight(TensorSpec(self.weight_name(), shape, torch.int64, self.seed(), 0, count))

    def find(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)

    def any(self, accept: Callable[[Value], bool]) -> Value:
        """Return a value that `accept` likes, the later ones more often than the weights."""
        good = [value for value in reversed(self.values) if accept(value)]
        if not good:
            raise Rejected("no such value")
        return pick(self.chooser, good[: max(4, len(good) // 2)] if self.chance(70) else good)

    def any_float(self, min_rank: int = 0) -> Value:
        return self.any(lambda v: v.is_float and v.tensor.dim() >= min_rank)

    def call(
        self, kind: str, target: Callable[..., object], *args: object, exact: bool = False, **kwargs: object
    ) -> Value:
        """Run `target` and add it. Raises Rejected if it fails, or if the result is not finite, too large or
        huge."""
        return self._keep(kind, target, args, kwargs, self._run(kind, target, args, kwargs), exact)

    def call_many(self, kind: str, target: Callable[..., object], *args: object) -> list[Value]:
        """Run a target with several results and add a `getitem` for each. The pieces are exact if the operand
        is."""
        results = self._run(kind, target, args, {})
        assert isinstance(results, (list, tuple))
        name = f"v{len(self.steps)}"
        self.steps.append(Step(name, kind, target, tuple(_encode(a) for a in args), ()))
        exact = isinstance(args[0], Value) and args[0].exact
        return [
            self._keep("getitem", operator.getitem, (Ref(name), i), {}, result, exact)
            for i, result in enumerate(results)
        ]

    def attempt(self, kind: str, build: Callable[[Builder], object]) -> bool:
        """Let `build` add its steps; if it rejects, take back all of them and return False."""
        steps, values, stream = len(self.steps), len(self.values), self.stream
        inputs, weights = len(self.inputs), len(self.weights)
        try:
            build(self)
        except Rejected:
            self.rejected[kind] += 1
            for spec in (*self.inputs[inputs:], *self.weights[weights:]):
                del self.made[spec.name]
            del self.steps[steps:], self.values[values:], self.inputs[inputs:], self.weights[weights:]
            self.stream = stream
            return False
        return True

    def _add_tensor(self, spec: TensorSpec) -> Value:
        tensor = spec.make(self.made)
        self.made[spec.name] = tensor
        value = Value(spec.name, tensor, exact=True)
        self.values.append(value)
        return value

    def _run(
        self, kind: str, target: Callable[..., object], args: Sequence[object], kwargs: dict[str, object]
    ) -> object:
        plain = [_decode(a) for a in args]
        try:
            return target(*plain, **{k: _decode(v) for k, v in kwargs.items()})
        except (RuntimeError, IndexError, ValueError) as error:
            raise Rejected(f"{kind}: {error}") from error

    def _keep(
        self,
        kind: str,
        target: Callable[..., object],
        args: Sequence[object],
        kwargs: dict[str, object],
        result: object,
        exact: bool,
    ) -> Value:
        assert isinstance(result, Tensor)
        if result.numel() > 40_000:
            raise Rejected(f"{kind}: {tuple(result.shape)} is too large for a quick test")
        if result.is_floating_point() and result.numel() and not float(result.abs().max()) <= _LARGEST:
            raise Rejected(f"{kind}: the result is not tame")
        value = Value(f"v{len(self.steps)}", result, exact)
        encoded = tuple((key, _encode(argument)) for key, argument in kwargs.items())
        self.steps.append(Step(value.name, kind, target, tuple(_encode(a) for a in args), encoded))
        self.values.append(value)
        return value


def _encode(argument: object) -> object:
    if isinstance(argument, Value):
        return Ref(argument.name)
    return [_encode(a) for a in argument] if isinstance(argument, (list, tuple)) else argument


def _decode(argument: object) -> object:
    if isinstance(argument, Value):
        return argument.tensor
    return [_decode(a) for a in argument] if isinstance(argument, (list, tuple)) else argument
