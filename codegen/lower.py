"""From a group of graph nodes to one kernel, or the reason why there is none.

    group -> pieces (what must be stored) -> parts (one loop structure each) -> kernel

Pieces that share an accumulator or loop over the same extents share a part; all others get a part, with a grid of
its own, in the same launch.  Structurally equal groups (the layers of a model) are lowered once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from torch import Tensor, fx

from torchweld.codegen.families.attention import build_attention_part
from torchweld.codegen.families.choice import build_choice_part, searches_products
from torchweld.codegen.families.common import Dependence, reductions
from torchweld.codegen.families.matmul import build_matmul_part
from torchweld.codegen.families.row import build_row_part
from torchweld.codegen.ir import Buffer, Indirect, Kernel, MatmulPart, Part, Store, part_axes, part_terms
from torchweld.codegen.naming import buffer_hint, kernel_name, unique
from torchweld.codegen.pieces import (
    APPEND,
    Piece,
    anchor_path,
    carry_forward,
    in_place_problem,
    pieces_of,
    slot_of,
)
from torchweld.codegen.work import kernel_work
from torchweld.graph.groups import Group, Work, kind_of
from torchweld.graph.meaning import Meaning, Unsupported, rule_of
from torchweld.graph.meaning.context import Index, shape_of, tensor_of
from torchweld.graph.program import source_line
from torchweld.graph.rewrite import Refusal
from torchweld.graph.terms import (
    Attend,
    Axis,
    Contract,
    Decode,
    Expr,
    Fold,
    Load,
    Sharing,
    Term,
    bound_axes,
    index_exprs,
    transform,
    walk,
)

MAX_PARTS = 8
MAX_BUFFERS = 48


@dataclass(frozen=True)
class LoweredGroup:
    """A kernel and which of the group's inputs its input buffers are; its output buffers are the group's outputs."""

    kernel: Kernel
    work: Work
    input_positions: tuple[int, ...]


@dataclass
class _Stored:
    """One store before it has found its part."""

    piece: Piece
    axes: tuple[Axis, ...]
    store: Store
    anchor: str  # "row", "contract", "attention", or "choice": rows of a matmul's result are searched


@dataclass
class Lowerer:
    """Lowers groups for a machine with `cores` cores; remembers structurally equal groups."""

    cores: int
    known: dict[str, LoweredGroup | str] = field(default_factory=dict)
    _texts: dict[fx.Node, str] = field(default_factory=dict)

    def __call__(self, group: Group) -> LoweredGroup | Refusal:
        """The group's kernel, or a refusal that names the reason."""
        key = self._structure(group)
        if key not in self.known:
            try:
                self.known[key] = lower_group(group, self.cores)
            except Unsupported as error:
                self.known[key] = str(error)
        result = self.known[key]
        return Refusal(result, group.nodes[-1]) if isinstance(result, str) else result

    def _structure(self, group: Group) -> str:
        """A text that is equal for two groups exactly if they are lowered to the same kernel."""
        number = {node: f"%{i}" for i, node in enumerate((*group.inputs, *group.inside))}
        lines = [f"{number[node]}: {self._text(node)} {buffer_hint(node)}" for node in group.inputs]
        for node in group.inside:
            args = fx.node.map_arg((node.args, node.kwargs), lambda n: number.get(n, n.meta.get("val")))
            lines.append(f"{number[node]} = {node.target}{args} {self._text(node)}")
            if node.target is APPEND:
                lines.append(in_place_problem(node) or "in place")
        lines.append(" ".join(number[node] for node in group.outputs))
        return "\n".join(lines)

    def _text(self, node: fx.Node) -> str:
        if node not in self._texts:
            value = node.meta.get("val")
            parts = value if isinstance(value, (tuple, list)) else [value]
            self._texts[node] = " ".join(
                f"{p.dtype}{tuple(p.shape)}" for p in parts if isinstance(p, Tensor)
            ) + (" weight" if node.op == "get_attr" else "")
        return self._texts[node]


def lower_group(group: Group, cores: int) -> LoweredGroup:
    """One kernel for `group`; Unsupported names what stands in the way."""
    for node in group.nodes:
        rule = rule_of(node)
        if rule is None:
            raise Unsupported(f"{node.target}: no rule gives its elements")
    for node in group.outputs:
        if kind_of(node) == "choice" and isinstance(node.meta.get("val"), (tuple, list)):
            raise Unsupported(
                "the greatest entries of rows in memory; kernels find those of a matmul's result"
            )
    names: dict[fx.Node, str] = {}
    for node in (*group.inputs, *group.outputs):
        names[node] = unique(buffer_hint(node), names.values())
    inside = frozenset(group.inside)
    meaning = Meaning(rule_of, inside, names.__getitem__)
    dependence = Dependence(meaning)
    unit = meaning.axis("one", sympy.Integer(1))
    starts: dict[fx.Node, tuple[Axis, ...]] = {}
    stored = [
        _store_piece(piece, inside, meaning, {node: f"{names[node]}_out" for node in group.outputs}, starts)
        for output in group.outputs
        for piece in pieces_of(output, inside)
    ]
    share = Sharing()
    for entry in stored:
        entry.store = replace(entry.store, value=share(entry.store.value))
    parts = tuple(
        _build_part(batch, dependence, f"{names[batch[0].piece.output]}{i}", unit)
        for i, batch in enumerate(_share_parts(stored, dependence))
    )
    _refuse_searched_twice(parts)
    if dependence.indirect_reductions():
        raise Unsupported("an index that is the result of a reduction in the same kernel")
    if len(parts) > MAX_PARTS:
        raise Unsupported(f"{len(parts)} loop structures in one kernel, at most {MAX_PARTS}")
    return _finish(group, names, meaning, parts, cores)


def _store_piece(
    piece: Piece,
    inside: frozenset[fx.Node],
    meaning: Meaning,
    buffers: dict[fx.Node, str],
    starts: dict[fx.Node, tuple[Axis, ...]],
) -> _Stored:
    """The store of one piece, over its anchor's axes if there is one, else over its own."""
    path = anchor_path(piece.node, inside)
    kind = kind_of(path[0]) if path else None
    anchor = kind if kind is not None else "row"
    axes = _start_axes(piece.node, meaning, starts) if not path else meaning.axes(shape_of(path[0]))
    start: Index = tuple(axis.symbol for axis in axes)
    index = carry_forward(path, start, meaning.ranges) if path else start
    value = meaning.value(piece.node, index)
    if not path and searches_products(value):
        anchor = "choice"
    place = piece.place(index) if piece.past is None else slot_of(piece, index, meaning)
    return _Stored(piece, axes, Store(buffers[piece.output], place, value), anchor)


def _start_axes(node: fx.Node, meaning: Meaning, starts: dict[fx.Node, tuple[Axis, ...]]) -> tuple[Axis, ...]:
    """New axes for the elements of `node`; the results of one operation have the same, so that what they fold alike
    is seen to be one thing."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), (tuple, list)):
        return meaning.axes(shape_of(node))
    shape = shape_of(node)
    if source not in starts or tuple(axis.extent for axis in starts[source]) != shape:
        starts[source] = meaning.axes(shape)
    return starts[source]


def _refuse_searched_twice(parts: Sequence[Part]) -> None:
    """Products that are searched are not kept: who wants them too would have them made again."""
    matmuls = [part for part in parts if isinstance(part, MatmulPart)]
    if len(matmuls) > 1 and any(part.choices for part in matmuls):
        raise Unsupported("the result of a matmul is searched beside another matmul")


def _share_parts(stored: Sequence[_Stored], dependence: Dependence) -> list[list[_Stored]]:
    """Stores that run in one loop: those that read the same accumulator, and rows over the same extents."""
    batches: list[list[_Stored]] = []
    for entry in stored:
        for batch in batches:
            if _can_share(batch[0], entry, dependence):
                batch.append(_over_axes(entry, batch[0].axes, dependence))
                break
        else:
            batches.append([entry])
    return batches


def _can_share(first: _Stored, second: _Stored, dependence: Dependence) -> bool:
    if first.anchor == second.anchor == "choice":
        return first.axes == second.axes
    if first.anchor != "row" or second.anchor != "row" or first.piece.output is second.piece.output:
        return False
    if tuple(a.extent for a in first.axes) != tuple(a.extent for a in second.axes):
        return False
    return _fold_positions(first, dependence) <= _fold_positions(second, dependence) or _fold_positions(
        second, dependence
    ) <= _fold_positions(first, dependence)


def _fold_positions(entry: _Stored, dependence: Dependence) -> frozenset[int]:
    needed = frozenset().union(*(dependence.of(fold) for fold in reductions([entry.store.value], Fold)))
    return frozenset(position for position, axis in enumerate(entry.axes) if axis.symbol in needed)


def _over_axes(entry: _Stored, axes: tuple[Axis, ...], dependence: Dependence) -> _Stored:
    """The same store with its loop variables renamed to `axes`, which have the same extents."""
    if entry.axes == axes:
        return entry
    renaming: dict[sympy.Symbol, Expr] = {
        old.symbol: new.symbol for old, new in zip(entry.axes, axes, strict=True)
    }
    return _Stored(entry.piece, axes, rename_axes(entry.store, renaming, dependence), entry.anchor)


def rename_axes(store: Store, renaming: Mapping[sympy.Symbol, Expr], dependence: Dependence) -> Store:
    """A store with its index variables renamed everywhere, also in what its data-dependent indices are read at."""
    known = dict(renaming)

    def index(expr: Expr) -> Expr:
        for symbol in expr.free_symbols - known.keys():
            entry = dependence.meaning.indirect_of(symbol)
            if entry is None or dependence.of(entry.term).isdisjoint(renaming):
                known[symbol] = symbol
            else:
                term = transform(entry.term, lambda _: None, index)
                known[symbol] = dependence.meaning.declare_indirect(term, entry.extent)
        return expr.xreplace(known)

    return Store(store.buffer, tuple(map(index, store.index)), transform(store.value, lambda _: None, index))


def _build_part(batch: Sequence[_Stored], dependence: Dependence, name: str, unit: Axis) -> Part:
    axes, stores = batch[0].axes, [entry.store for entry in batch]
    if batch[0].anchor == "choice":
        return build_choice_part(axes, stores, dependence, name, unit)
    roots: list[Term] = [store.value for store in stores]
    for family, term in (("contract", Contract), ("attention", Attend)):
        if reductions(roots, term) and batch[0].anchor != family:
            raise Unsupported("a reduction or a selection over the result of a matmul or an attention")
    if batch[0].anchor == "contract":
        return build_matmul_part(axes, stores, dependence, name, unit)
    if batch[0].anchor == "attention":
        return build_attention_part(axes, stores, dependence, name)
    return build_row_part(axes, stores, dependence, name)


def _finish(
    group: Group, names: dict[fx.Node, str], meaning: Meaning, parts: tuple[Part, ...], cores: int
) -> LoweredGroup:
    """Buffers, sizes and data-dependent indices that the parts really use."""
    indirects, terms = _used_indirects(parts, meaning)
    loaded = {t.buffer: t for t in terms if isinstance(t, (Load, Decode))}
    positions = tuple(i for i, node in enumerate(group.inputs) if names[node] in loaded)
    buffers = [_buffer(group.inputs[i], names, loaded) for i in positions]
    buffers += [
        Buffer(
            f"{names[node]}_out",
            tensor_of(node).dtype,
            shape_of(node),
            "update" if node.target is APPEND else "output",
        )
        for node in group.outputs
    ]
    if len(buffers) > MAX_BUFFERS:
        raise Unsupported(f"{len(buffers)} buffers in one kernel, at most {MAX_BUFFERS}")
    sizes = _size_names(buffers, parts, terms, indirects)
    sources = tuple(dict.fromkeys(source_line(node) for node in group.nodes))
    ops = tuple(str(node.target) for node in group.nodes)
    kernel = Kernel(kernel_name(group), tuple(buffers), sizes, parts, indirects, sources, ops)
    return LoweredGroup(kernel, kernel_work(kernel, cores), positions)


def _buffer(node: fx.Node, names: dict[fx.Node, str], loaded: dict[str, Load | Decode]) -> Buffer:
    access = loaded[names[node]]
    format = access.format if isinstance(access, Decode) else None
    role = "weight" if node.op == "get_attr" else "input"
    return Buffer(names[node], tensor_of(node).dtype, shape_of(node), role, format)  # type: ignore[arg-type]


def _used_indirects(parts: Sequence[Part], meaning: Meaning) -> tuple[tuple[Indirect, ...], list[Term]]:
    """The data-dependent indices that stand in the parts, and all terms of parts and indices."""
    terms = [term for part in parts for term in part_terms(part)]
    pending = {entry.symbol: entry for entry in meaning.indirects}
    used: dict[str, Indirect] = {}
    exprs = [e for term in terms for e in index_exprs(term)] + [
        e for p in parts for s in p.stores for e in s.index
    ]
    while exprs:
        symbols = {s.name for expr in exprs for s in expr.free_symbols}
        new = [pending.pop(name) for name in list(pending) if name in symbols]
        fresh = [term for entry in new for term in walk(entry.term)]
        used |= {entry.symbol: Indirect(entry.symbol, entry.term, entry.extent) for entry in new}
        terms += fresh
        exprs = [e for term in fresh for e in index_exprs(term)]
    return tuple(used[name] for name in sorted(used, key=lambda name: int(name[2:]))), terms


def _size_names(
    buffers: Sequence[Buffer], parts: Sequence[Part], terms: Sequence[Term], indirects: Sequence[Indirect]
) -> tuple[str, ...]:
    exprs = [e for b in buffers for e in b.shape] + [entry.extent for entry in indirects]
    exprs += [axis.extent for part in parts for axis in part_axes(part)]
    exprs += [axis.extent for term in terms for axis in bound_axes(term)]
    exprs += [e for term in terms for e in index_exprs(term)]
    exprs += [term.t_extent for term in terms if isinstance(term, Attend)]
    symbols = {symbol.name for expr in exprs for symbol in expr.free_symbols if symbol.is_positive}
    return tuple(sorted(symbols, key=lambda name: (len(name), name)))
