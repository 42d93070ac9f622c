"""Calls of cached_attention with symbolic sizes, and what turns a function into a plan with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torchweld.codegen.build_plan import BuiltPlan, build_plan
from torchweld.codegen.ir import Kernel
from torchweld.codegen.lower import LoweredGroup, Lowerer, lower_group
from torchweld.graph.cost import pricing
from torchweld.graph.fusion import run_fusion
from torchweld.graph.groups import Group, GroupGraph
from torchweld.graph.ops import cached_attention as _ops  # noqa: F401  registers torchweld::cached_attention
from torchweld.graph.target import Target
from torchweld.passes import FUSE

#: Launches are dear and arithmetic is nearly free: whatever is legal pays.
EAGER_TO_FUSE = Target("eager to fuse", 10.0, 1000.0, 1000.0, 1000.0, 20.0, 1 << 20, 0, 2)


def symbolic_graph(
    function: Callable[..., Any], inputs: Sequence[Tensor], dynamic: Mapping[int, Sequence[int]]
) -> fx.GraphModule:
    """`function` as a graph; the sizes in `dynamic` (input -> dimensions) are symbols, one per different size."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(number: int, tensor: Tensor) -> Tensor:
        chosen = dynamic.get(number, ())
        kinds = [DimDynamic.DUCK if d in chosen else DimDynamic.STATIC for d in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)  # type: ignore[no-untyped-call]
        return mode.from_tensor(tensor, static_shapes=False, symbolic_context=context)

    with mode:
        return make_fx(function, tracing_mode="real")(*(fake(n, t) for n, t in enumerate(inputs)))


def plan_of_graph(module: fx.GraphModule, fused: bool = True) -> BuiltPlan:
    """The plan of a graph, with everything fused that can be."""
    symbols = {
        str(size.node.expr): size.node.hint
        for node in module.graph.find_nodes(op="placeholder")
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    }
    groups = GroupGraph.of(module, Lowerer(2), pricing(EAGER_TO_FUSE, symbols), symbols)
    for pass_ in FUSE if fused else ():
        run_fusion(groups, pass_)
    return build_plan(groups)


@dataclass(frozen=True)
class Problem:
    """One call of cached_attention. window 0 stands for "causal"; tree and mask say whether there is one."""

    query_heads: int = 2
    key_heads: int = 2
    features: int = 8
    value_features: int = 8
    window: int = 0
    tree: bool = False
    mask: str = ""
    soft_cap: float = 0.0
    dtype: torch.dtype = torch.float32
    sinks: bool = False

    def call(self, *tensors: Tensor) -> Tensor:
        """The operation on (query, key, value, past, path?, mask?, sinks?)."""
        query, key, value, past, *rest = tensors
        path = rest.pop(0) if self.tree else None
        mask = rest.pop(0) if self.mask else None
        sinks = rest.pop(0) if self.sinks else None
        kind = "window" if self.window else "causal"
        scale = self.features**-0.5
        result: Tensor = torch.ops.torchweld.cached_attention(
            query, key, value, past, path, mask, kind, self.window, scale, self.soft_cap, sinks
        )
        return result


@dataclass(frozen=True)
class Call:
    """Tensors of a call, and how many rows were there before, per sequence."""

    problem: Problem
    tensors: tuple[Tensor, ...]

    def eager(self) -> Tensor:
        """The result in float64."""
        return self.problem.call(*(t.double() if t.is_floating_point() else t for t in self.tensors))

    def rows(self, first: int, count: int) -> Call:
        """The same keys, asked for `count` rows from row `first` on (no tree)."""
        query, key, value, past, *rest = self.tensors
        assert not self.problem.tree
        return replace(
            self, tensors=(query[:, :, first : first + count].contiguous(), key, value, past + first, *rest)
        )


def random_parents(count: int, generator: torch.Generator) -> list[int]:
    """The row before each row: some earlier row, or -1 for the cached text."""
    return [int(torch.randint(-1, row, (), generator=generator)) if row else -1 for row in range(count)]


def path_of(parents: Sequence[int]) -> Tensor:
    """int64 [T, T]: the ancestors of every row from the root on, -1 behind itself."""
    path = torch.full((len(parents), len(parents)), -1)
    for row in range(len(parents)):
        chain = [row]
        while parents[chain[0]] >= 0:
            chain.insert(0, parents[chain[0]])
        path[row, : len(chain)] = torch.tensor(chain)
    return path


def make_call(problem: Problem, past: Sequence[int], count: int, spare: int, seed: int = 0) -> Call:
    """Random keys of every visible position in their slots, NaN in all other slots; `spare` slots more than needed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(problem.dtype)

    batch, p = len(past), problem
    needed = p.window + count - 1 if p.window else max(past, default=0) + count
    capacity = max(needed + spare, 1)
    key = torch.full((batch, p.key_heads, capacity, p.features), float("nan"), dtype=p.dtype)
    value = torch.full((batch, p.key_heads, capacity, p.value_features), float("nan"), dtype=p.dtype)
    for b, before in enumerate(past):
        first = max(0, before - p.window + 1) if p.window else 0
        slots = torch.arange(first, before + count) % capacity
        key[b][:, slots] = draw(p.key_heads, len(slots), p.features)
        value[b][:, slots] = draw(p.key_heads, len(slots), p.value_features)
    tensors = [
        draw(batch, p.query_heads, count, p.features),
        key,
        value,
        torch.tensor(past, dtype=torch.int64),
    ]
    if p.tree:
        paths = [path_of(random_parents(count, generator)) for _ in past]
        tensors.append(torch.stack(paths) if paths else torch.zeros(0, count, count, dtype=torch.int64))
    if p.mask:
        shape = (batch, 1, count, capacity)
        visible = torch.rand(shape, generator=generator) > 0.3
        tensors.append(visible if p.mask == "bool" else draw(*shape))
    if p.sinks:
        tensors.append(2 * draw(p.query_heads))
    return Call(problem, tuple(tensors))


@functools.cache
def kernel_of(problem: Problem) -> Kernel:
    """The kernel of the call, for any batch, number of rows and capacity."""
    call = make_call(problem, [5, 6], 3, 4 if problem.window else 7, seed=1)
    dims: list[tuple[int, ...]] = [(0, 2), (0, 2), (0, 2), (0,)]
    dims += [(0, 1, 2)] if problem.tree else []
    dims += [(0, 2, 3)] if problem.mask else []
    dynamic = dict(enumerate(dims))
    module = symbolic_graph(problem.call, call.tensors, dynamic)
    (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.torchweld.cached_attention.default)
    lowered = lower_group(Group(0, (node,)), cores=2)
    assert isinstance(lowered, LoweredGroup)
    return lowered.kernel


def alone(call: Call, sequence: int, row: int, capacity: int) -> Call:
    """One row of a call by itself: a batch of one, no tree, its visible keys laid out anew in `capacity` slots."""
    problem = replace(call.problem, tree=False)
    query, key, value, past, *rest = call.tensors
    before = int(past[sequence])
    chain = list(range(row + 1))
    if call.problem.tree:
        path = rest.pop(0)[sequence, row]
        chain = path[path >= 0].tolist()
    position = before + len(chain) - 1
    old, new = key.shape[2], torch.full((2,), float("nan"))
    sides = []
    first = max(0, position - problem.window + 1) if problem.window else 0
    for side in (key, value):
        laid = new[:1].to(side.dtype).expand(1, side.shape[1], capacity, side.shape[3]).clone()
        for j in range(first, position + 1):
            slot = j % old if j < before else (before + chain[j - before]) % old
            laid[0, :, j % capacity] = side[sequence, :, slot]
        sides.append(laid)
    one = query[sequence : sequence + 1, :, row : row + 1].contiguous()
    tensors = [one, *sides, torch.tensor([position])]
    if call.problem.mask:
        mask = rest.pop(0)[sequence : sequence + 1, :, row : row + 1]
        room = torch.zeros(1, 1, 1, capacity, dtype=mask.dtype)
        room[..., : position + 1] = mask[..., : position + 1]
        tensors.append(room)
    tensors += rest[-1:] if call.problem.sinks else []
    return Call(problem, tuple(tensors))


def run_on_triton(folder: str) -> list[float]:
    """The greatest errors of a few calls in Triton's interpreter (the process must have been started for that)."""
    from pathlib import Path

    from tests.codegen.cpp_cases import plan_of
    from tests.pipeline.triton_programs import TritonRunner
    from torchweld.codegen.plan_inputs import bind_sizes

    runner, errors = TritonRunner(Path(folder)), []
    for problem, past, count in TRITON_CALLS:
        call, kernel = make_call(problem, past, count, spare=3, seed=5), kernel_of(problem)
        names = [buffer.name for buffer in kernel.buffers if not buffer.is_written]
        sizes = bind_sizes(plan_of(kernel), [tuple(tensor.shape) for tensor in call.tensors])
        (result,) = runner(kernel, dict(zip(names, call.tensors, strict=True)), sizes).values()
        error = (result.double() - call.eager().double()).abs().max()
        errors.append(float(error.nan_to_num(nan=float("inf"))))
    return errors


TRITON_CALLS = (
    (Problem(4, 2, 16, 16), [5, 40], 3),
    (Problem(4, 2, window=10), [30, 3], 5),
    (Problem(2, 1, tree=True, window=6), [20, 3], 6),
    (Problem(2, 1, 20, 24, tree=True, mask="float", soft_cap=3.0), [0, 20], 4),
    (Problem(6, 2, 16, 16, sinks=True), [5, 40], 3),
    (Problem(4, 2, window=10, sinks=True, soft_cap=3.0), [30, 0], 5),
)

if __name__ == "__main__":
    import sys

    print(run_on_triton(sys.argv[1]))
