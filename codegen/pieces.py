"""What a group must store: every output, cut at its concatenations, and where an anchor's element lands in it.

A kernel built around a matmul or an attention loops over the *anchor's* index, not the output's: the output's index
is the anchor's carried forward through the operations between them.  Only maps that neither drop nor repeat elements
(reshape, permute, elementwise) can be carried; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from torchweld.graph.groups import kind_of
from torchweld.graph.index import ZERO, Ranges, reindex_reshape
from torchweld.graph.meaning.context import (
    Index,
    Meaning,
    Unsupported,
    argument,
    index_value,
    normalize_dim,
    shape_of,
)
from torchweld.graph.meaning.views import permuted_dims
from torchweld.graph.ops.scan import CachedScan
from torchweld.graph.terms import Expr, cast, op

aten = torch.ops.aten
RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default,
})  # fmt: skip
PERMUTES = frozenset({
    aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default,
})  # fmt: skip
APPEND = torch.ops.torchweld.append_rows.default
RUNNING = torch.ops.torchweld.cached_running.default
MAX_PIECES = (
    8  # each piece is a part, and a kernel has at most eight: a longer concatenation reads under guards
)


@dataclass(frozen=True)
class Piece:
    """One store: `node`'s values go to `output`'s buffer, at an index that `place` derives from the node's index.

    past: for rows appended to a cache, the node with the number of rows before them; row t goes to slot
    (past + t) mod capacity instead.
    """

    output: fx.Node
    node: fx.Node
    place: Callable[[Index], Index]
    past: fx.Node | None = None


def pieces_of(output: fx.Node, inside: Collection[fx.Node]) -> list[Piece]:
    """The stores of one output: one, or one per tensor of a concatenation (written in place, side by side).

    Unsupported names why rows cannot be appended to a cache in place.
    """
    if output.target is APPEND:
        return [_appended(output)]
    if output.target not in (aten.cat.default, aten.concat.default, aten.stack.default):
        return [Piece(output, output, lambda index: index)]
    tensors = output.args[0]
    assert isinstance(tensors, Sequence)
    if len(tensors) > MAX_PIECES or not all(isinstance(tensor, fx.Node) for tensor in tensors):
        return [Piece(output, output, lambda index: index)]
    dim = normalize_dim(argument(output, 1, "dim", 0), len(shape_of(output)))
    pieces, start = [], ZERO
    for number, tensor in enumerate(tensors):
        assert isinstance(tensor, fx.Node)
        if output.target == aten.stack.default:
            pieces.append(Piece(output, tensor, _insert(dim, ZERO + number)))
            continue
        shape = shape_of(tensor)
        if len(shape) == 1 and len(shape_of(output)) != 1:
            continue  # torch lets an empty vector stand in any concatenation
        pieces.append(Piece(output, tensor, _shift(dim, start)))
        start = start + shape[dim]
    return pieces


def _appended(output: fx.Node) -> Piece:
    cache, rows, past = output.args[:3]
    problem = in_place_problem(output)
    if problem is not None:
        raise Unsupported(problem)
    assert isinstance(cache, fx.Node) and isinstance(rows, fx.Node) and isinstance(past, fx.Node)
    return Piece(output, rows, lambda index: index, past)


def in_place_problem(output: fx.Node) -> str | None:
    """Why the rows of an append_rows cannot be written into the cache itself; None if they can."""
    cache, rows = output.args[:2]
    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
        return f"the cache {cache} is computed, not given to the program: the rows go into a copy of it"
    earlier = _ancestors(rows) if len(cache.users) > 1 else set()
    others = [user.name for user in cache.users if user is not output and not _reads_before(user, earlier)]
    if rows is cache or others:
        reader = output.name if rows is cache else others[0]
        return f"{reader} reads the cache {cache.name} as it was before: the rows go into a copy of it"
    return None


def _reads_before(reader: fx.Node, earlier: Collection[fx.Node]) -> bool:
    """Has a reader of a cache done so before the rows are there? It runs eagerly, on what the rows are made of.

    Whoever asks for a size of the cache reads no element of it.
    """
    if isinstance(reader.meta.get("val"), torch.SymInt):
        return True
    return (reader.target is RUNNING or isinstance(reader.target, CachedScan)) and reader in earlier


def _ancestors(node: object) -> set[fx.Node]:
    """A node and what it is computed from."""
    pending = [node] if isinstance(node, fx.Node) else []
    seen = set(pending)
    while pending:
        fresh = [source for source in pending.pop().all_input_nodes if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return seen


def slot_of(piece: Piece, index: Index, meaning: Meaning) -> Index:
    """The place of a row that is appended: (past + t) mod capacity, an index known only when the kernel runs."""
    batch, head, row, feature = index
    capacity = shape_of(piece.output)[2]
    start = cast(meaning.value(piece.past, (batch,)), torch.int64)
    position = op("add", start, index_value(row))
    slot = meaning.declare_indirect(op("mod", position, index_value(capacity)), capacity)
    return batch, head, slot, feature


def _insert(dim: int, position: Expr) -> Callable[[Index], Index]:
    return lambda index: (*index[:dim], position, *index[dim:])


def _shift(dim: int, start: Expr) -> Callable[[Index], Index]:
    return lambda index: (*index[:dim], index[dim] + start, *index[dim + 1 :])


def anchor_path(node: fx.Node, inside: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes from an anchor (matmul, attention) up to `node`; empty where none is reached without a reduction."""
    stack: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, (node,))]
    seen: set[fx.Node] = set()
    while stack:
        current, path = stack.pop()
        if current in seen or current not in inside:
            continue
        seen.add(current)
        kind = kind_of(current)
        if kind in ("contract", "attention"):
            return list(reversed(path))
        if kind in ("pointwise", "view"):
            stack.extend((operand, (*path, operand)) for operand in reversed(current.all_input_nodes))
    return []


def carry_forward(path: Sequence[fx.Node], index: Index, ranges: Ranges) -> Index:
    """The index at the end of `path` of the element that stands at `index` at its start."""
    for before, after in pairwise(path):
        old, new = shape_of(before), shape_of(after)
        if after.target in RESHAPES:
            index = reindex_reshape(index, old, new, ranges)
        elif after.target in PERMUTES:
            index = tuple(index[dim] for dim in permuted_dims(after))
        elif new == old:
            continue
        elif (
            len(new) > len(old)
            and new[len(new) - len(old) :] == old
            and all(s == 1 for s in new[: len(new) - len(old)])
        ):
            index = (*([ZERO] * (len(new) - len(old))), *index)
        else:
            raise Unsupported(
                f"{after.name}: the result of {path[0].name} is read at other places than it is made"
            )
    return index
