"""The float64 reference: run a captured graph, or a plain module, with every float made a double.

The reference has to be *one mathematical meaning*, so it is not enough to cast the weights: a graph captured
from a float32 or bfloat16 model says `to(float32)`, `full(dtype=bfloat16)` or `dequantize -> float32` in its
middle, and each of them would round the reference. Three rules remove them:

* every floating tensor that enters an operation is a double (inputs, weights, constants, results of
operations);
* every floating `dtype` argument is read as float64;
* operations that make floats from integers use float64 as the default dtype while the reference runs.

`rounding_spread` runs the same graph with each operation disturbed by one rounding of the dtype it is really
computed in. What comes out is the error that a correct program of that dtype *may* have, cancellation
included; the comparison (graph/compare.py) uses it as a yardstick for graphs too small for an eager run to be
one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import fx, nn
from torch.fx.node import Argument, Target, map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_Value = TypeVar("_Value")
Outputs = tuple[object, ...]

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NARROW_METHODS = frozenset({"float", "half", "bfloat16"})

#: Operations (overload packet names) that only move bits: their result is judged bit for bit, and rounding
#: skips them.
DATA_MOVEMENT = frozenset(
    """alias_copy as_strided cat chunk clone constant_pad_nd contiguous detach embedding expand expand_as
    flatten flip gather getitem index index_select movedim narrow pad permute repeat repeat_interleave reshape
    roll select slice split split_with_sizes squeeze stack t transpose tril triu unbind unflatten unsqueeze
    view where _reshape_alias _unsafe_view alias lift_fresh_copy masked_fill""".split()
)

#: Operations that jump: a disturbed operand would move their result by a whole step, so they read the
#: undisturbed one.
_DISCONTINUOUS = frozenset(
    """argmax argmin argsort bitwise_and bitwise_not bitwise_or ceil eq floor floor_divide ge gt isfinite
    isinf isnan le logical_and logical_not logical_or logical_xor lt ne remainder round sign sort topk
    trunc""".split()
)


def packet_name(target: Target) -> str:
    """Return the bare operation name of a node target: `aten.add.Tensor` -> `add`, `operator.getitem` ->
    `getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_data_movement(graph_module: fx.GraphModule) -> bool:
    """Return True if every call in the graph only moves bits, so that its outputs are promised bit for
    bit."""
    return all(
        packet_name(node.target) in DATA_MOVEMENT
        for node in graph_module.graph.nodes
        if node.op in ("call_function", "call_method", "call_module")
    )


def promote(value: _Value) -> _Value:
    """Return `value` with a float32, float16 or bfloat16 tensor as float64 and such a dtype as
    torch.float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _NARROW else value  # type: ignore[return-value]
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value  # type: ignore[return-value]
    return value


@contextmanager
def _default_dtype_float64() -> Iterator[None]:
    """Make `int / int`, `arange(0.0, 1.0)` and `full(0.1)` give doubles; the previous default comes back in
    any case."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Float64Interpreter(fx.Interpreter):
    """Run a graph with all floats as float64; nested graphs (fused groups) and own operations included.

    Raises:
        ValueError: at an operation that reinterprets the bits of a float (`view.dtype`), which has no float64
        meaning.
    """

    def placeholder(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        return tree_map(promote, super().placeholder(target, args, kwargs))

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        return promote(super().get_attr(target, args, kwargs))

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]
    ) -> object:
        if target is torch.ops.aten.view.dtype:
            return promote(self._reinterpret(args, kwargs))
        wide_args, wide_kwargs = map_aggregate(args, promote), map_aggregate(kwargs, promote)
        return tree_map(promote, super().call_function(target, wide_args, wide_kwargs))

    def call_method(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        name = "double" if target in _NARROW_METHODS else target
        wide_args, wide_kwargs = map_aggregate(args, promote), map_aggregate(kwargs, promote)
        return tree_map(promote, super().call_method(name, wide_args, wide_kwargs))

    def call_module(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        assert isinstance(target, str)
        submodule = self.fetch_attr(target)
        if isinstance(submodule, fx.GraphModule):
            return self.nested(submodule).run(*args)
        return tree_map(promote, copy.deepcopy(submodule).double()(*args, **kwargs))

    def nested(self, submodule: fx.GraphModule) -> fx.Interpreter:
        """Return the interpreter for a fused group's own graph."""
        return Float64Interpreter(submodule)

    def _reinterpret(self, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> torch.Tensor:
        data = args[0]
        assert isinstance(data, torch.Tensor)
        if data.is_floating_point():
            raise ValueError(
                f"float64 reference: view.dtype of a float tensor {tuple(data.shape)} reinterprets bits and "
                "has no meaning in float64; keep stored weights as uint8 and use torchweld::dequantize"
            )
        result: torch.Tensor = torch.ops.aten.view.dtype(*args, **kwargs)
        return result


class _RoundingInterpreter(Float64Interpreter):
    """Float64 run in which each arithmetic operation is disturbed by one rounding of its real dtype.

    Operands and results get a factor 1 + u or 1 - u, at random per element. Disturbed operands show what a
    sum that cancels does to the error (the result alone would not); they are disturbed per reader, so that
    the stored value stays exact for comparisons and argmax, which only jump where the real program could jump
    too.
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype, generator: torch.Generator) -> None:
        super().__init__(module)
        self._dtype, self._generator = dtype, generator
        self._unit = unit_roundoff(dtype)

    def run_node(self, n: fx.Node) -> object:
        # One u per node: a bfloat16 model computes its norms in float32, and a cast rounds to the dtype it
        # names.
        fake = n.meta.get("val")
        dtype = fake.dtype if isinstance(fake, torch.Tensor) else self._dtype
        self._unit = unit_roundoff(dtype) if dtype.is_floating_point else unit_roundoff(self._dtype)
        return super().run_node(n)

    def call_function(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]
    ) -> object:
        name = packet_name(target)
        if name in DATA_MOVEMENT or name in _DISCONTINUOUS:
            return super().call_function(target, args, kwargs)
        disturbed = map_aggregate(args, self._disturb), map_aggregate(kwargs, self._disturb)
        result = super().call_function(target, *disturbed)
        if isinstance(result, torch.Tensor):
            magnitude = _inner_magnitude(name, *args)
            result = result if magnitude is None else result + self._disturb(magnitude) - magnitude
        return tree_map(self._disturb, result)

    def nested(self, submodule: fx.GraphModule) -> fx.Interpreter:
        return _RoundingInterpreter(submodule, self._dtype, self._generator)

    def _disturb(self, value: _Value) -> _Value:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        signs = (
            torch.randint(0, 2, value.shape, generator=self._generator, dtype=torch.float64)
            .mul_(2.0)
            .sub_(1.0)
        )
        return value.double() * signs.mul_(self._unit).add_(1.0)  # type: ignore[return-value]


def _inner_magnitude(name: str, *args: Argument) -> torch.Tensor | None:
    """Return the size of what an operation subtracts inside, where disturbing its operands cannot show it.

    layer_norm: x * rstd - mean * rstd; a row of equal values is not 0 but u * |x| / sqrt(eps) off it.
    gelu: x/2 + x/2 * erf; for x << 0 the two are nearly opposite.
    """
    x = args[0]
    if not isinstance(x, torch.Tensor) or x.numel() == 0:
        return None
    x = x.double()
    if name == "gelu":
        return x
    if name != "layer_norm":
        return None
    shape, weight = args[1], args[2] if len(args) > 2 else None
    eps = args[4] if len(args) > 4 else 1e-5
    assert isinstance(shape, (list, tuple)) and isinstance(eps, float)
    variance = x.var(tuple(range(-len(shape), 0)), correction=0, keepdim=True)
    magnitude = x * (variance + eps).rsqrt()
    return magnitude * weight.double() if isinstance(weight, torch.Tensor) else magnitude


class _Float64Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Promote at the dispatcher, for modules and functions that were never captured."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is torch.ops.aten.view.dtype:
            return func(*args, **(kwargs or {}))
        return tree_map(promote, func(*tree_map(promote, args), **tree_map(promote, kwargs or {})))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of rounding to nearest: 2^-24 float32, 2^-8 bfloat16, 2^-11
    float16."""
    return float(torch.finfo(dtype).eps) / 2.0


def reference_float64(
    graph_module: fx.GraphModule,
    inputs: Sequence[object],
    interpreter: type[Float64Interpreter] = Float64Interpreter,
) -> Outputs:
    """Run a captured graph in float64 and return its flat outputs; floats are float64, integers and bools as
    they are.

    `inputs` are the flat placeholder values in order; they are not changed. Weights are widened one at a time
    and freed after their last use, so a large model needs its activations, not its weights, twice.
    `interpreter`: graph/float64_pieces.py has one that does not even widen a whole weight.
    Raises ValueError for a graph that reinterprets the bits of floats.
    """
    with torch.no_grad(), _default_dtype_float64():
        result = interpreter(graph_module).run(*inputs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def to_float64(module: nn.Module, args: Sequence[object], kwargs: dict[str, object] | None = None) -> object:
    """Run any module in float64 without capturing it and return its own output structure.

    A reference that does not depend on capture. The module is not changed: it is called with doubles in place
    of its parameters and buffers, and a float that it makes inside is widened at the dispatcher.
    """
    state = {name: promote(value) for name, value in (*module.named_parameters(), *module.named_buffers())}
    wide_args, wide_kwargs = tree_map(promote, tuple(args)), tree_map(promote, kwargs or {})
    mode = _Float64Mode()  # type: ignore[no-untyped-call]
    with torch.no_grad(), _default_dtype_float64(), mode:
        return torch.func.functional_call(module, state, wide_args, wide_kwargs)


def rounding_spread(
    graph_module: fx.GraphModule,
    inputs: Sequence[object],
    dtype: torch.dtype,
    *,
    samples: int = 6,
    seed: int = 0,
) -> Outputs:
    """Return per output the largest absolute deviation from the float64 reference over `samples` disturbed
    runs.

    Float outputs give a float64 tensor of the output's shape, other outputs None. Costs `samples + 1` float64
    runs, so it is for tests and small graphs. Source: Monte Carlo arithmetic (Parker, 1997), with relative
    noise of one unit roundoff of `dtype` (or of the dtype a node's fake value names).
    """
    reference = reference_float64(graph_module, inputs)
    generator = torch.Generator().manual_seed(seed)
    spread = [
        torch.zeros_like(ref) if isinstance(ref, torch.Tensor) and ref.is_floating_point() else None
        for ref in reference
    ]
    for _ in range(samples):
        with torch.no_grad(), _default_dtype_float64():
            run = _RoundingInterpreter(graph_module, dtype, generator).run(*inputs)
        for i, (value, ref) in enumerate(zip(run, reference, strict=True)):
            before = spread[i]
            if before is not None:
                spread[i] = torch.maximum(before, (value - ref).abs().nan_to_num(0.0))
    return tuple(spread)
