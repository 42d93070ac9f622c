"""Derive the step graph of a causal program: new tokens and the cached keys and values in, logits and new rows out.

before:  logits = f(ids[B, S])                                   attention(q, k, v, "causal")
after:   logits, k', v' = f(ids[B, T], k[P, B, H, D], v[P, B, H, D])
                                                                 attention(q, cat(k, k'), cat(v, v'), "causal")
why:     a token then costs one row of every matmul instead of S rows
legal:   position t of every value depends on position t alone (graph/sequence_rules.py), but for attention with a
         mask proved causal or window; positions are lines of arange, tables are sliced from their start
source:  TensorRT-LLM AutoDeploy, insert_cached_attention; the proof in place of its pattern list is ours

One graph serves prefill (P = 0), one token and many. Rows come first in a cache tensor, so that the first P rows
of a larger buffer are contiguous. Only the logits of the last position are computed unless all are asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from torchweld.graph.edit import drop_unused_tensors, erase_dead, insert_node
from torchweld.graph.edit import replace as replace_node
from torchweld.graph.match import MAX_INDEX, aten, dim_key, is_tensor, tensor_of
from torchweld.graph.program import Program, SizeRange
from torchweld.graph.rewrite import Exactness, Refusal
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_rules import analyse_sequence

NAME: Final = "rewrite_kv_cache"
EXACTNESS: Exactness = "reassoc"

LogitsFor = Literal["last", "all"]
# A prime that no traced size equals, so that no comparison with the past comes out true by coincidence.
TRACED_PAST: Final = 37
ROWS_FIRST: Final = [2, 0, 1, 3]  # [B, H, P, D] -> [P, B, H, D]
HEADS_FIRST: Final = [1, 2, 0, 3]


@dataclass(frozen=True)
class LayerState:
    """What one attention keeps: keys [P, B, heads, key_features] and values [P, B, heads, value_features].

    A window layer needs `window` rows; today it keeps all of them.  `mask_proof` says how the mask was proved.
    """

    attention: str
    kind: str
    window: int
    heads: int
    key_features: int
    value_features: int
    dtype: torch.dtype
    mask_proof: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of one batch row adds."""
        return self.heads * (self.key_features + self.value_features) * self.dtype.itemsize


@dataclass(frozen=True)
class StepProgram:
    """A program (ids [B, T], (k0, v0, k1, v1, ...)) -> (logits [B, 1 or T, V], (new rows of k0, of v0, ...)).

    limit: how many positions the model's tables and the capture allow; None where nothing limits them.
    """

    program: Program
    states: tuple[LayerState, ...]
    limit: int | None
    logits: LogitsFor


def derive_step(program: Program, logits: LogitsFor = "last") -> StepProgram | Refusal:
    """The step program of a canonicalised and recognised causal program, which stays as it is; or why there is none.

    The refusal names the first node that has no place in a causal step (a node of a copy of the graph).
    """
    step = program.copied()
    found = analyse_sequence(step)
    if isinstance(found, Refusal):
        return found
    tail = _find_tail(step.graph, found) if logits == "last" else []
    _drop_unread_inputs(step.graph)
    pairs = _cached_pairs(found)
    states = tuple(_describe(found, pair) for pair in pairs)
    pasts = _add_pasts(step, found.tokens, pairs)
    sizes = _insert_sizes(step.graph, found.tokens, pasts[0])
    for attention, mask in found.key_masks.items():
        copier = _Copier(found, {}, sizes.total, attention)
        attention.update_arg(3, copier.copy(mask))
    _shift_positions(step.graph, found, sizes)
    past_of = dict(zip(pairs, zip(pasts[::2], pasts[1::2], strict=True), strict=True))
    _read_pasts(step.graph, found, past_of)
    rows = [_insert_view(node, ROWS_FIRST, step.graph.output_node()) for pair in pairs for node in pair]
    result = _last_only(step.graph, found, tail, sizes) if logits == "last" else found.logits
    step.graph.output_node().args = ((result, *rows),)
    erase_dead(step.graph)
    step.graph_module.recompile()
    drop_unused_tensors(step.graph_module)
    return StepProgram(_with_signature(step, found.tokens, pasts), states, found.limit, logits)


@dataclass(frozen=True)
class _Sizes:
    """Nodes of the step graph: past P, new tokens T, P + T."""

    past: fx.Node
    new: fx.Node
    total: fx.Node


Pair = tuple[fx.Node, fx.Node]


def _cached_pairs(found: SequenceAnalysis) -> list[Pair]:
    """(key, value) of every attention, once where layers share them."""
    pairs = [(attention.args[1], attention.args[2]) for attention in found.attentions]
    return list(dict.fromkeys(pairs))  # type: ignore[arg-type]  # the analysis saw that both are nodes


def _drop_unread_inputs(graph: fx.Graph) -> None:
    """Inputs that the graph does not read, such as a flag, are no inputs of a step."""
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)


def _add_pasts(step: Program, tokens: fx.Node, pairs: list[Pair]) -> list[fx.Node]:
    """One input per cached tensor, [P, B, heads, features], all with one new size symbol P >= 0."""
    mode = step.fake_mode
    environment = mode.shape_env
    assert environment is not None  # the sequence of the tokens is symbolic, which the analysis has seen
    source = ConstantSource("past_length")
    symbol = environment.create_symbol(
        TRACED_PAST, source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
    )
    past = environment.create_symintnode(symbol, hint=TRACED_PAST, source=source)
    inputs: list[fx.Node] = []
    last = tokens
    for number, pair in enumerate(pairs):
        for name, node in zip(("key", "value"), pair, strict=True):
            like = tensor_of(node)
            with step.graph.inserting_after(last):
                last = step.graph.placeholder(f"past_{name}_{number}")
            with mode:
                shape = (past, tensor_of(tokens).shape[0], like.shape[1], like.shape[3])
                last.meta["val"] = torch.empty(shape, dtype=like.dtype, device=like.device)
            last.meta["made_by"] = NAME
            inputs.append(last)
    return inputs


def _insert_sizes(graph: fx.Graph, tokens: fx.Node, past: fx.Node) -> _Sizes:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    length = insert_node(graph, first, aten.sym_size.int, (past, 0), made_by=NAME, like=tokens)
    new = insert_node(graph, first, aten.sym_size.int, (tokens, 1), made_by=NAME, like=tokens)
    total = insert_node(graph, first, operator.add, (length, new), made_by=NAME, like=tokens)
    return _Sizes(length, new, total)


def _shift_positions(graph: fx.Graph, found: SequenceAnalysis, sizes: _Sizes) -> None:
    """Let every position source start where the past ends."""
    for source in found.sources:
        node, slope = source.node, source.line.slope
        shift = sizes.past
        if slope != 1:
            shift = insert_node(graph, node.next, operator.mul, (sizes.past, slope), made_by=NAME, like=node)
        moved = insert_node(graph, node.next, aten.add.Tensor, (node, shift), made_by=NAME, like=node)
        if shift is not sizes.past:
            moved.prepend(shift)
        replace_node(node, moved)
    for table in found.tables:
        node = table.node
        start = sizes.past
        if table.start:
            start = insert_node(graph, node, operator.add, (sizes.past, table.start), made_by=NAME, like=node)
        end = insert_node(graph, node, operator.add, (start, sizes.new), made_by=NAME, like=node)
        node.args, node.kwargs = (node.args[0], table.axis, start, end), {}


def _read_pasts(graph: fx.Graph, found: SequenceAnalysis, past_of: Mapping[Pair, Pair]) -> None:
    """Let every attention read the past in front of the new rows; its mask counts positions from the last key."""
    joined: dict[Pair, tuple[fx.Node, ...]] = {}
    for attention in found.attentions:
        key: Any = attention.args[1]
        value: Any = attention.args[2]
        pair: Pair = (key, value)
        if pair not in joined:
            joined[pair] = tuple(
                _insert_joined(graph, attention, past, new)
                for past, new in zip(past_of[pair], pair, strict=True)
            )
        for place, node in enumerate(joined[pair], start=1):
            attention.update_arg(place, node)


def _insert_joined(graph: fx.Graph, before: fx.Node, past: fx.Node, new: fx.Node) -> fx.Node:
    """[B, heads, P + T, features]: the past and the new rows."""
    parts = [_insert_view(past, HEADS_FIRST, before), new]
    return insert_node(graph, before, aten.cat.default, (parts, 2), made_by=NAME, like=new)


def _insert_view(node: fx.Node, order: list[int], before: fx.Node) -> fx.Node:
    return insert_node(before.graph, before, aten.permute.default, (node, order), made_by=NAME, like=node)


def _find_tail(graph: fx.Graph, found: SequenceAnalysis) -> list[fx.Node]:
    """[cut, node, node, ...]: the earliest value behind the last attention through which alone the logits follow
    the sequence, and the nodes from there to the logits. Only the last position of all these is ever read."""
    needed = _ancestors(found.logits)
    order = [node for node in graph.nodes if node in needed]
    place = {node: number for number, node in enumerate(order)}
    last_use = {
        node: max((place[user] for user in node.users if user in place), default=-1) for node in order
    }
    start = max(place[attention] for attention in found.attentions)
    reach = max(last_use[node] for node in order[:start] if node in found.along)
    for number in range(start, len(order)):
        node = order[number]
        if node not in found.along:
            continue
        if reach <= number and _may_cut(found, node, order[number + 1 :]):
            return [node, *(later for later in order[number + 1 :] if later in found.along)]
        reach = max(reach, last_use[node])
    return [found.logits]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen = {node}
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


def _may_cut(found: SequenceAnalysis, cut: fx.Node, tail: Iterable[fx.Node]) -> bool:
    """The cut has a sequence axis of its own, and the tail reads the length as such only: it becomes 1."""
    along = found.along[cut]
    if dim_key(tensor_of(cut).shape[along.axis]) != found.symbol:
        return False
    lengths = {source for node in tail for source in node.all_input_nodes if _follows(found, source)}
    return all(dim_key(source.meta["val"]) == found.symbol for source in lengths)


def _follows(found: SequenceAnalysis, node: fx.Node) -> bool:
    """Is this a size that depends on the sequence length?"""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and found.symbol in value.node.expr.free_symbols


def _last_only(graph: fx.Graph, found: SequenceAnalysis, tail: list[fx.Node], sizes: _Sizes) -> fx.Node:
    """The logits [B, 1, V] of the last position: the tail over again, behind a slice of its first value."""
    cut = tail[0]
    output = graph.output_node()
    start = insert_node(graph, output, operator.sub, (sizes.new, 1), made_by=NAME, like=cut)
    args = (cut, found.along[cut].axis, start, MAX_INDEX)
    last = insert_node(graph, output, aten.slice.Tensor, args, made_by=NAME, like=cut)
    logits: fx.Node = _Copier(found, {cut: last}, 1, output).copy(tail[-1])
    return logits


@dataclass
class _Copier:
    """Copies what a value is computed from, as far as it follows the sequence, with another length in its place."""

    found: SequenceAnalysis
    known: dict[fx.Node, Any]
    length: fx.Node | int
    before: fx.Node

    def copy(self, node: fx.Node) -> Any:
        """The copy of `node`: itself where nothing in it follows the sequence."""
        if node in self.known:
            return self.known[node]
        if node not in self.found.along and not _follows(self.found, node):
            return node
        if not is_tensor(node) and dim_key(node.meta["val"]) == self.found.symbol:
            return self.length
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.copy)
        copied = insert_node(
            self.before.graph, self.before, node.target, args, kwargs, made_by=NAME, like=node  # type: ignore[arg-type]
        )  # fmt: skip
        self.known[node] = copied
        return copied


def _describe(found: SequenceAnalysis, pair: Pair) -> LayerState:
    """The widest reader of a pair decides what is kept."""
    readers = [attention for attention in found.attentions if attention.args[1:3] == pair]
    widest = next((reader for reader in readers if reader.args[4] == "causal"), readers[0])
    key, value = (tensor_of(node) for node in pair)
    window: Any = widest.args[5]
    return LayerState(
        attention=widest.name,
        kind=str(widest.args[4]),
        window=int(window),
        heads=int(key.shape[1]),
        key_features=int(key.shape[3]),
        value_features=int(value.shape[3]),
        dtype=key.dtype,
        mask_proof=str(widest.meta.get("mask_proof", "")),
    )


def _with_signature(step: Program, tokens: fx.Node, pasts: list[fx.Node]) -> Program:
    """The step program's pytree signature and size ranges."""
    states = tuple(node.name for node in pasts)
    ranges = [replace(size, input=tokens.name) for size in step.sizes if size.input == tokens.name]
    ranges += [SizeRange(name, 0, 0, None) for name in states]
    return replace(
        step,
        in_spec=pytree.tree_structure(((tokens.name, states), {})),
        out_spec=pytree.tree_structure(("logits", states)),
        name=f"{step.name} step",
        parameters=(tokens.name, "states"),
        sizes=tuple(ranges),
    )
