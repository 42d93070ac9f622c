"""Random programs of ATen operations, as a traced and functionalized transformer would give them.

`generate(seed)` is fast and reproducible; `programs()` is the hypothesis strategy over the same choices,
which shrinks. Both give a `GeneratedCase`: a GraphModule in the form of a captured program (flat
placeholders, weights as get_attr, a flat tuple of outputs), its inputs, and `case.code()`, a program that
runs alone. `generate(seed, symbolic=True)` keeps to operations whose shapes follow from the first input's
batch and token sizes, and asks for them by `sym_size`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from tests.generators.builder import SIZES, Builder, Ref, Size, Step, Value
from tests.generators.choosing import Chooser, DrawChooser, RandomChooser, chance, pick
from tests.generators.operations import OPERATIONS
from tests.generators.structures import STRUCTURES
from tests.generators.tensors import LAYOUTS, TensorSpec, helper_code

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOVES: MappingProxyType[str, Callable[[Builder], object]] = MappingProxyType({**OPERATIONS, **STRUCTURES})
MOVES = tuple(_MOVES)
_MAX_OUTPUTS = 6
#: Attention has the most spellings, so it is drawn more often than the other structures.
_STRUCTURE_POOL = (*STRUCTURES, "attention", "attention")


@dataclass(frozen=True)
class GeneratedCase:
    """One random program. `ops` counts the operations that reach an output, by kind; `dtype` is the main
    dtype."""

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    ops: Counter[str]
    description: str
    dtype: torch.dtype
    symbolic: bool
    input_specs: tuple[TensorSpec, ...]
    weight_specs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    rejected: Counter[str]

    def code(self) -> str:
        """Return a Python program that makes the inputs and weights, runs the operations and prints the
        outputs."""
        lines = ["import operator", "", "import torch", "from torch import device  # noqa: F401", ""]
        lines += [f"import {name}" for name in _own_modules(self.steps)] + ["", helper_code(), ""]
        lines += [spec.code() for spec in (*self.input_specs, *self.weight_specs)]
        lines += ["", "", f"def program({', '.join(spec.name for spec in self.input_specs)}):"]
        lines += [f"    {step.name} = {_call_text(step)}" for step in self.steps]
        lines += [f"    return ({', '.join(self.outputs)},)", "", ""]
        lines += [
            f"for output in program({', '.join(spec.name for spec in self.input_specs)}):",
            "    print(output)",
        ]
        return "\n".join(lines) + "\n"

    def with_fake_values(self) -> fx.GraphModule:
        """Set node.meta["val"] to fake tensors of the concrete sizes and strides and return the module.

        The strides are those of a real run. Running the shape rules instead takes thirty times as long.
        """
        set_fake_values(self.module, self.inputs)
        return self.module

    def dynamic_shapes(self) -> tuple[dict[int, object], ...]:
        """Return the `dynamic_shapes` for torch.export of a symbolic case: batch and tokens of every [B, T,
        ...]."""
        dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        return tuple({d: dim for d, dim in dims.items() if d < x.dim()} for x in self.inputs)

    def __repr__(self) -> str:
        return self.description


def set_fake_values(module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Set node.meta["val"] of every node to fake tensors of the sizes and strides that a run on `inputs` has."""
    _FakeValues(module).run(*inputs)


class _FakeValues(fx.Interpreter):
    """Run a module on real tensors and leave a fake tensor of the same size, stride and dtype on each
    node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._mode = FakeTensorMode()

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = tree_map(self._fake, result)
        return result

    def _fake(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        with self._mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def generate(seed: int, *, dtype: torch.dtype | None = None, symbolic: bool = False) -> GeneratedCase:
    """Return the case of this seed; consecutive seeds each contain another operation, so few seeds cover all
    kinds."""
    return _generate(RandomChooser(seed), f"seed {seed}", MOVES[seed % len(MOVES)], dtype, symbolic)


@st.composite
def programs(draw: st.DrawFn, dtype: torch.dtype | None = None, symbolic: bool = False) -> GeneratedCase:
    """Hypothesis strategy of cases; shrinks to few operations, simple layouts and small sizes."""
    chooser = DrawChooser(draw)
    return _generate(chooser, "drawn", pick(chooser, MOVES), dtype, symbolic)


def _generate(
    chooser: Chooser, origin: str, must: str, dtype: torch.dtype | None, symbolic: bool
) -> GeneratedCase:
    if dtype is None:
        dtype = pick(chooser, (torch.float32, *DTYPES))
    b = _start(chooser, dtype, symbolic)
    moves = sorted(STRUCTURES) if symbolic else list(MOVES)
    done = [must] if must in moves and b.attempt(must, _MOVES[must]) else []
    # "One more?" instead of a number of moves: so hypothesis can cut out a move and shrink on.
    while len(done) < 8 and chooser.integer(0, 5):
        pool = _STRUCTURE_POOL if symbolic or chance(chooser, 45) else tuple(OPERATIONS)
        name = pick(chooser, pool)
        if len(b.steps) >= 60:
            break
        if b.attempt(name, _MOVES[name]):
            done.append(name)
    if not b.steps:
        # Whatever was drawn did not fit (a batch of 0, say): a program has at least one operation.
        b.stream = b.call("neg", torch.ops.aten.neg.default, b.stream, exact=True)
    return _finish(b, origin, done)


def _start(chooser: Chooser, dtype: torch.dtype, symbolic: bool) -> Builder:
    sizes = SIZES if not chance(chooser, 5) else (0,)
    batch = 2 if symbolic else pick(chooser, (1, 2, 3))
    tokens = 7 if symbolic else pick(chooser, sizes)
    heads = pick(chooser, (1, 2, 3, 4))
    kv_heads = pick(chooser, [h for h in (heads, 1, 2) if heads % h == 0])
    head_width = pick(chooser, (2, 4, 8, 16) if chance(chooser, 70) else (1, 3, 5, 7, 13, 17, 31, 33))
    b = Builder(chooser, dtype, Size(batch, 0), Size(tokens, 1), heads, kv_heads, head_width, symbolic)
    _add_inputs(b)
    return b


def _add_inputs(b: Builder) -> None:
    shape = (int(b.batch), int(b.tokens), b.width)
    layout = "contiguous" if b.chance(50) else b.pick(*LAYOUTS)
    b.stream = b.add_input(TensorSpec("x0", shape, b.dtype, b.seed(), layout=layout))
    for _ in range(b.chooser.integer(0, 3)):
        name, seed, layout = b.input_name(), b.seed(), b.pick(*LAYOUTS)
        kind = b.pick("stream", "ids", "mask", "channels", "scalar", "same", "overlap")
        if kind == "ids":
            b.add_input(TensorSpec(name, shape[:2], torch.int64, seed, 0, 31, layout))
        elif b.symbolic and kind != "stream":
            continue
        elif kind == "stream":
            b.add_input(TensorSpec(name, shape, b.dtype, seed, layout=layout))
        elif kind == "mask":
            b.add_input(TensorSpec(name, shape[1:], torch.bool, seed, layout=layout))
        elif kind == "channels":
            b.add_input(TensorSpec(name, shape[2:], b.dtype, seed, 0.5, 1.5, layout))
        elif kind == "scalar":
            b.add_input(TensorSpec(name, (), b.dtype, seed, 0.5, 1.5))
        elif kind == "same":
            b.add_input(TensorSpec(name, shape, b.dtype, seed, alias="same:x0"))
        elif b.inputs[0].layout == "padded":
            b.add_input(TensorSpec(name, shape, b.dtype, seed, alias="overlap:x0"))


def _finish(b: Builder, origin: str, done: list[str]) -> GeneratedCase:
    outputs = _choose_outputs(b)
    steps = _live_steps(b.steps, outputs)
    used = {ref for step in steps for ref in _refs(step)} | set(outputs)
    weights = tuple(spec for spec in b.weights if spec.name in used)
    module = _build_module(b, steps, weights, outputs)
    layouts = ", ".join(f"{s.name} {list(s.shape)} {s.alias or s.layout}" for s in b.inputs)
    dtype = str(b.dtype).removeprefix("torch.")
    return GeneratedCase(
        module=module,
        inputs=tuple(b.made[spec.name] for spec in b.inputs),
        ops=Counter(step.kind for step in steps),
        description=f"{origin}: {dtype}, {layouts}; {len(steps)} operations from {' + '.join(done) or 'neg'}",
        dtype=b.dtype,
        symbolic=b.symbolic,
        input_specs=tuple(b.inputs),
        weight_specs=weights,
        steps=steps,
        outputs=outputs,
        rejected=b.rejected,
    )


def _choose_outputs(b: Builder) -> tuple[str, ...]:
    """Return what nobody reads (the latest few), the stream, and now and then a value twice, a view or an
    input."""
    read = {ref for step in b.steps for ref in _refs(step)}
    computed = {step.name for step in b.steps}
    tensors: list[Value] = [v for v in b.values if v.name in computed]
    names = [v.name for v in tensors if v.name not in read][-_MAX_OUTPUTS:]
    if b.stream.name not in names and b.stream.name in computed:
        names.append(b.stream.name)
    if b.chance(8):
        names.append(b.pick(names[0], b.inputs[0].name, pick(b.chooser, tensors).name))
    return tuple(names)


def _refs(step: Step) -> list[str]:
    found: list[str] = []

    def visit(argument: object) -> None:
        if isinstance(argument, Ref):
            found.append(argument.name)
        elif isinstance(argument, (list, tuple)):
            for item in argument:
                visit(item)

    visit(step.args)
    visit([value for _, value in step.kwargs])
    return found


def _live_steps(steps: list[Step], outputs: tuple[str, ...]) -> tuple[Step, ...]:
    needed, live = set(outputs), []
    for step in reversed(steps):
        if step.name in needed:
            needed.update(_refs(step))
            live.append(step)
    return tuple(reversed(live))


def _build_module(
    b: Builder, steps: tuple[Step, ...], weights: tuple[TensorSpec, ...], outputs: tuple[str, ...]
) -> fx.GraphModule:
    root, graph, nodes = nn.Module(), fx.Graph(), {}
    for spec in b.inputs:
        nodes[spec.name] = graph.placeholder(spec.name)
    sizes: dict[int, fx.Node] = {}
    for spec in weights:
        tensor = b.made[spec.name]
        if tensor.is_floating_point():
            root.register_parameter(spec.name, nn.Parameter(tensor, requires_grad=False))
        else:
            root.register_buffer(spec.name, tensor)
        nodes[spec.name] = graph.get_attr(spec.name)

    def encode(argument: object) -> object:
        if isinstance(argument, Ref):
            return nodes[argument.name]
        if isinstance(argument, Size):
            if not b.symbolic:
                return int(argument)
            if argument.dim not in sizes:
                place = nodes[b.inputs[0].name]
                sizes[argument.dim] = graph.call_function(torch.ops.aten.sym_size.int, (place, argument.dim))
            return sizes[argument.dim]
        return [encode(item) for item in argument] if isinstance(argument, (list, tuple)) else argument

    for step in steps:
        args, kwargs = tuple(encode(a) for a in step.args), {key: encode(v) for key, v in step.kwargs}
        nodes[step.name] = graph.call_function(step.target, args, kwargs, name=step.name)  # type: ignore[arg-type]
    graph.output(tuple(nodes[name] for name in outputs))
    return fx.GraphModule(root, graph).eval()


def _own_modules(steps: tuple[Step, ...]) -> list[str]:
    own = {str(step.target) for step in steps if str(step.target).startswith("torchweld.")}
    return sorted(f"torchweld.graph.ops.{name.split('.')[1]}" for name in own)


def _call_text(step: Step) -> str:
    arguments = [_text(a) for a in step.args] + [f"{key}={_text(value)}" for key, value in step.kwargs]
    if isinstance(step.target, torch._ops.OpOverload):
        return f"torch.ops.{step.target}({', '.join(arguments)})"
    return f"operator.{step.target.__name__}({', '.join(arguments)})"


def _text(argument: object) -> str:
    if isinstance(argument, Ref):
        return argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(_text(item) for item in argument)}]"
    return repr(int(argument)) if isinstance(argument, Size) else repr(argument)
