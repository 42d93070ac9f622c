"""Copy a token-local graph with other sizes: a batch of one, and rows of any sequences on the sequence axis.

    copier = StepCopier(found, graph, batch, length_node, known)
    packed = copier.copy(node)

before:  x [batch, S, d] -> x + places[arange(S)]
after:   x [1, N, d]     -> x + places[positions]           N rows, each with the position that the caller gives it
legal:   position t of every value depends on position t alone (graph/sequence_rules.py), so rows may stand in any order
         and belong to any sequence; a batch of one is the model run on one sequence alone

Every copied node runs its shape rule again; nothing of the old metadata is kept but the source line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import sympy
import torch
from torch import fx

from torchweld.graph.edit import fake_weight, insert_node
from torchweld.graph.match import aten, dim_key, is_tensor, shape_of, tensor_of
from torchweld.graph.program import find_fake_mode, get_tensor
from torchweld.graph.sequence import PositionSource, PositionTable, SequenceAnalysis
from torchweld.graph.shape_memo import ShapeMemo

NAME: Final = "rewrite_kv_cache"
# What these fill with; None: with their last argument.
FILLED: Final[dict[Any, int | None]] = {
    **dict.fromkeys((aten.ones_like.default, aten.new_ones.default), 1),
    **dict.fromkeys((aten.zeros_like.default, aten.new_zeros.default), 0),
    **dict.fromkeys((aten.full_like.default, aten.new_full.default)),
}
Expr = Any  # sympy has no stubs


@dataclass(frozen=True)
class Stand:
    """What stands for a node instead of its copy: `make()`, once `needs` are copied."""

    needs: tuple[fx.Node, ...]
    make: Callable[[], fx.Node]


@dataclass
class StepCopier:
    """Copies values of the analysed program into `graph`, in front of its output.

    length: the node that is the number of rows there.  positions: int64 [length], the position of every row.
    known: copies made so far.  stands: nodes that become something else; position sources and tables are added here.
    """

    found: SequenceAnalysis
    source: fx.GraphModule
    graph: fx.Graph
    length: fx.Node
    positions: fx.Node
    known: dict[fx.Node, Any] = field(default_factory=dict)
    stands: dict[fx.Node, Stand] = field(default_factory=dict)
    memo: ShapeMemo = field(default_factory=ShapeMemo)

    def __post_init__(self) -> None:
        for line in self.found.sources:
            self.stands[line.node] = Stand((), partial(self._line, line))
        for table in self.found.tables:
            values = table.node.all_input_nodes[0]
            self.stands[table.node] = Stand((values,), partial(self._rows_of, table, values))

    def copy(self, wanted: fx.Node) -> Any:
        """The copy of a node: a node, or a number for a size that is fixed now. Deep graphs need no deep stack."""
        pending = [wanted]
        while pending:
            node = pending[-1]
            missing = [] if node in self.known else [n for n in self._needs(node) if n not in self.known]
            if missing:
                pending.extend(missing)
                continue
            if node not in self.known:
                self.known[node] = self._copy_one(node)
            pending.pop()
        return self.known[wanted]

    def make(self, target: Callable[..., object], *args: object, like: fx.Node, **kwargs: object) -> fx.Node:
        """A new node at the end of the graph."""
        end = self.graph.output_node()
        return insert_node(self.graph, end, target, args, kwargs, made_by=NAME, like=like, memo=self.memo)

    def _needs(self, node: fx.Node) -> Iterable[fx.Node]:
        """What must be copied first."""
        if self._size(node) is not None or self._filled(node) is not None:
            return ()
        return self.stands[node].needs if node in self.stands else node.all_input_nodes

    def _copy_one(self, node: fx.Node) -> Any:
        size = self._size(node)
        if size is not None:
            return size
        if node in self.stands:
            return self.stands[node].make()
        if node.op == "get_attr":
            return self._weight(node)
        filled = self._filled(node)
        if filled is not None:
            shape, number = filled
            return self.make(aten.full.default, shape, number, like=node, dtype=tensor_of(node).dtype)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.known.__getitem__)
        if not is_tensor(node) and not isinstance(node.meta.get("val"), (tuple, list)):
            return self._number(node, args)
        return self.make(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]

    def _number(self, node: fx.Node, args: tuple[Any, ...]) -> Any:
        """A size: computed now where nothing in it varies any more."""
        if node.target is aten.sym_size.int:
            extent = tensor_of(args[0]).shape[args[1]]
            if isinstance(extent, int):
                return extent
        elif not any(isinstance(arg, fx.Node) for arg in args):
            return node.target(*args)  # type: ignore[operator]
        return self.make(node.target, *args, like=node)  # type: ignore[arg-type]

    def _size(self, node: fx.Node) -> fx.Node | int | None:
        """The new value of a size that is the batch, the sequence, or both multiplied; None for anything else."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        return self.size_of(dim_key(value))

    def size_of(self, size: Expr) -> fx.Node | int | None:
        """The new value of an extent of the source program; None if it needs arithmetic."""
        alone = sympy.sympify(size).subs(self.found.batch, 1)
        if alone.is_Integer:
            return int(alone)
        return self.length if alone == self.found.symbol else None

    def _filled(self, node: fx.Node) -> tuple[list[Any], Any] | None:
        """Shape and number of a tensor that only takes its shape or dtype from another, which need not be copied."""
        if node.target not in FILLED:
            return None
        shape: list[Any] = [self.size_of(size) for size in shape_of(node)]
        number: Any = FILLED[node.target]
        if number is None:
            number = node.args[-1]
        return None if None in shape or isinstance(number, fx.Node) else (shape, number)

    def _weight(self, node: fx.Node) -> fx.Node:
        tensor = get_tensor(self.source, str(node.target))
        with self.graph.inserting_before(self.graph.output_node()):
            copy = self.graph.create_node("get_attr", str(node.target))
        copy.meta = {key: value for key, value in node.meta.items() if key != "val"}
        copy.meta["val"] = fake_weight(find_fake_mode(self.graph), tensor)
        return copy

    def _line(self, source: PositionSource) -> fx.Node:
        """`first + slope * position`, in the shape and dtype of the source."""
        node, line = source.node, source.line
        value = self.positions
        if line.slope != 1:
            value = self.make(aten.mul.Tensor, value, line.slope, like=node)
        if line.first:
            value = self.make(aten.add.Tensor, value, line.first, like=node)
        if tensor_of(node).dtype != torch.int64:
            value = self.make(aten._to_copy.default, value, like=node, dtype=tensor_of(node).dtype)
        extents = [self.size_of(size) for size in shape_of(node)]
        flat = [extent if extent is self.length else 1 for extent in extents]
        value = self.make(aten.reshape.default, value, flat, like=node)
        return value if flat == extents else self.make(aten.expand.default, value, extents, like=node)

    def _rows_of(self, table: PositionTable, values: fx.Node) -> fx.Node:
        """`table[start + position]` along the table's axis."""
        places = self.positions
        if table.start:
            places = self.make(aten.add.Tensor, places, table.start, like=table.node)
        return self.make(aten.index_select.default, self.known[values], table.axis, places, like=table.node)
