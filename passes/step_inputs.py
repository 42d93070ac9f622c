"""The inputs of a step graph: tokens, how much is cached, positions, rows that get logits, a tree, and the caches.

    ids int64 [B, T], past int64 [B], positions int64 [B, T], rows int64 [R], (path int64 [B, T, T] for a tree,)
    then, of an encoder, encoded_i (passes/step_cross.py),
    then per pair of keys and values: key_i [B, heads, C, key features], value_i [B, heads, C, value features],
    and state_i [B, 1, C, features] for what keeps rows of one kind (a convolution, a cumulative sum, one
    carry of a scan), in graph order

B, T, R and one C per kind of layer are symbolic and may be any size; nothing about them is guessed from an example.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from torchweld.graph.edit import insert_node
from torchweld.graph.match import aten, tensor_of
from torchweld.graph.program import find_fake_mode

# Sizes that shape rules are run at: primes that no model has, so that no comparison comes out true by coincidence.
TRACED: Final = {"batch": 1009, "new": 1013, "rows": 1019}
TRACED_CAPACITY: Final = 2003


@dataclass(frozen=True)
class CacheShape:
    """One pair of caches: heads, features of a key and of a value, dtype; `group` chooses the capacity symbol.

    value_features 0: one cache alone.
    """

    group: int
    heads: int
    key_features: int
    value_features: int
    dtype: torch.dtype


@dataclass(frozen=True)
class StepInputs:
    """Input nodes of a step graph, and the nodes behind them that everything else is made of.

    packed: tokens [1, B * T, ...].  flat_positions [B * T].  Sizes: batch B, new T, length B * T, chosen R.
    """

    ids: fx.Node
    past: fx.Node
    positions: fx.Node
    rows: fx.Node
    caches: tuple[tuple[fx.Node, ...], ...]
    batch: fx.Node
    new: fx.Node
    length: fx.Node
    chosen: fx.Node
    packed: fx.Node
    flat_positions: fx.Node

    @property
    def all_inputs(self) -> tuple[fx.Node, ...]:
        """Input nodes in their order."""
        caches = (node for pair in self.caches for node in pair)
        return (self.ids, self.past, self.positions, self.rows, *caches)


def add_step_inputs(
    graph: fx.Graph, tokens: torch.Tensor, caches: Sequence[CacheShape], *, made_by: str, like: fx.Node
) -> StepInputs:
    """Begin an empty graph with the inputs of a step; `tokens` is the [batch, sequence, ...] of the source program."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    device = tokens.device

    def size(name: str, example: int) -> torch.SymInt:
        return new_size(environment, name, example)

    def tensor(name: str, shape: tuple[int | torch.SymInt, ...], dtype: torch.dtype = torch.int64) -> fx.Node:
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        node.meta["made_by"] = made_by
        return node

    batch, new, chosen = (size(name, example) for name, example in TRACED.items())
    rest = tuple(int(extent) for extent in tokens.shape[2:])
    ids = tensor("ids", (batch, new, *rest), tokens.dtype)
    past, positions = tensor("past", (batch,)), tensor("positions", (batch, new))
    rows = tensor("rows", (chosen,))
    groups = dict.fromkeys(shape.group for shape in caches)
    capacity = {group: size(f"capacity_{n}", TRACED_CAPACITY + 4 * n) for n, group in enumerate(groups)}
    pairs = []
    for number, shape in enumerate(caches):
        slots = (batch, shape.heads, capacity[shape.group])
        widths = {f"key_{number}": shape.key_features, f"value_{number}": shape.value_features}
        if not shape.value_features:
            widths = {f"state_{number}": shape.key_features}
        pairs.append(tuple(tensor(name, (*slots, width), shape.dtype) for name, width in widths.items()))
    end = graph.output(())

    def make(target: object, *args: object) -> fx.Node:
        return insert_node(graph, end, target, args, made_by=made_by, like=like)  # type: ignore[arg-type]

    rows_of_a_sequence, sequences = make(aten.sym_size.int, ids, 1), make(aten.sym_size.int, ids, 0)
    length = make(operator.mul, sequences, rows_of_a_sequence)
    return StepInputs(
        ids, past, positions, rows, tuple(pairs), sequences, rows_of_a_sequence, length,
        make(aten.sym_size.int, rows, 0), make(aten.reshape.default, ids, [1, length, *rest]),
        make(aten.reshape.default, positions, [length]),
    )  # fmt: skip


def new_size(environment: ShapeEnv, name: str, example: int) -> torch.SymInt:
    """A symbolic size that may be anything; `example` is what shape rules are run at."""
    # Here and not above: it takes a second to import, and a step that comes from the cache makes no sizes.
    from torch._dynamo.source import ConstantSource

    source = ConstantSource(f"step_{name}")
    symbol = environment.create_symbol(
        example, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
    )
    made = environment.create_symintnode(symbol, hint=example, source=source)
    assert isinstance(made, torch.SymInt)
    return made


def add_path_input(graph: fx.Graph, ids: fx.Node, after: fx.Node, *, made_by: str) -> fx.Node:
    """The input `path` int64 [B, T, T] of a tree, behind the input `after`."""
    batch, new = tensor_of(ids).shape[:2]
    with graph.inserting_after(after):
        path = graph.placeholder("path")
    with find_fake_mode(graph):
        path.meta["val"] = torch.empty((batch, new, new), dtype=torch.int64, device=tensor_of(ids).device)
    path.meta["made_by"] = made_by
    return path
