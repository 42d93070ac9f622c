"""Derive the step graph of a causal program: new tokens and caches in, logits of chosen rows and the caches out.

before:  logits = f(ids[B, S])                                   attention(q, k, v, "causal")
after:   logits, caches = f(ids[B, T], past[B], positions[B, T], rows[R], caches[B, H, C, D]...)
             keys = append_rows(keys, k, past);  values = append_rows(values, v, past)
             cached_attention(q, keys, values, past, path, mask, "causal")
why:     a token then costs one row of every matmul instead of S rows
legal:   position t of every value depends on position t alone (graph/sequence_rules.py), but for attention with a
         mask proved causal or window, causal convolutions (step_states.py), cumulative sums and their kin
         (step_running.py) and scans (step_scan.py); positions are lines of arange, tables are sliced from their start
source:  TensorRT-LLM AutoDeploy, insert_cached_attention; the proof in place of its pattern list is ours

The same proof lets the rows of all sequences lie behind each other in a batch of one (`step_copy`):
positions become an input, sequences need not be equally long, and only around attention the rows are seen as
[B, H, T, D]. One graph serves prefill, one token, many, and (with `path`) a tree. docs/decisions/0006 says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
import torch.utils._pytree as pytree
from torch import fx

from torchweld.graph.edit import drop_unused_tensors, erase_dead
from torchweld.graph.match import aten, is_tensor, shape_of, tensor_of
from torchweld.graph.ops import cached_attention as cached_attention_op
from torchweld.graph.ops.scan import CachedScan
from torchweld.graph.program import Program, SizeRange
from torchweld.graph.rewrite import Exactness, Refusal
from torchweld.graph.sequence import SequenceAnalysis
from torchweld.graph.sequence_rules import analyse_sequence
from torchweld.passes.split_encoder import split_encoder
from torchweld.passes.step_carried import CarriedScope
from torchweld.passes.step_copy import NAME, Stand, StepCopier
from torchweld.passes.step_cross import CrossWriter, add_encoded_inputs
from torchweld.passes.step_inputs import CacheShape, StepInputs, add_path_input, add_step_inputs
from torchweld.passes.step_pairs import PairWriter
from torchweld.passes.step_program import LayerState, StepProgram
from torchweld.passes.step_running import CACHED_RUNNING
from torchweld.passes.step_states import CACHED_ROWS, describe_carried, stands_of_carried

__all__ = ["EXACTNESS", "NAME", "LayerState", "StepProgram", "derive_step", "with_tree"]

EXACTNESS: Exactness = "reassoc"
HEADS_TO_ROWS: Final = [0, 2, 1, 3]  # [B, H, T, D] <-> [B, T, H, D]
APPEND: Final = torch.ops.torchweld.append_rows.default
CACHED_ATTENTION: Final = torch.ops.torchweld.cached_attention.default
PATH_ARGUMENT: Final = {CACHED_ATTENTION: 4, CACHED_ROWS: 3, CACHED_RUNNING: 3}
# Importing it is what registers the ops.
OPERATOR_FILES: Final = (cached_attention_op.__name__,)


def derive_step(program: Program, tokens: str | None = None) -> StepProgram | Refusal:
    """The step program of a canonicalised and recognised causal program, which stays as it is; or why there is none.

    The refusal names the first node that has no place in a causal step. `with_tree` makes the variant for trees.
    """
    found = analyse_sequence(program, tokens)
    if isinstance(found, Refusal):
        return found
    encoder = split_encoder(program, found) if found.encoded else None
    refusal = encoder if isinstance(encoder, Refusal) else _check_states(found)
    if refusal is not None:
        return refusal
    described = {holder: _describe(found, holder) for holder in _holders(found)}
    states = tuple(state for several in described.values() for state in several)
    graph = fx.Graph()
    shapes = [
        CacheShape(state.window, state.heads, state.key_features, state.value_features, state.dtype)
        for state in states
    ]
    inputs = add_step_inputs(graph, tensor_of(found.tokens), shapes, made_by=NAME, like=found.tokens)
    encoded = add_encoded_inputs(found, inputs, made_by=NAME)
    given = iter(inputs.caches)
    caches = {
        holder: tuple(cache for _ in several for cache in next(given))
        for holder, several in described.items()
    }
    results = _StepWriter(found, program.graph_module, inputs, caches, encoded).write()
    graph.output_node().args = (tuple(results),)
    erase_dead(graph)
    graph.lint()
    step = fx.GraphModule(program.graph_module, graph)
    drop_unused_tensors(step)
    vocabulary = shape_of(found.logits)[2]
    signed = _with_signature(program, step, inputs, [node.name for node in encoded.values()])
    return StepProgram(
        signed, states, found.limit, int(vocabulary), found.token_limit, is_tree=False,
        encoder=encoder if isinstance(encoder, Program) else None, crosses=_describe_crosses(found),
    )  # fmt: skip


def with_tree(step: StepProgram) -> StepProgram:
    """The same step with the input `path` int64 [B, T, T] behind `rows`: the new rows are a tree."""
    program = step.program.copied()
    ids, _, _, rows, *_ = program.placeholders
    path = add_path_input(program.graph, ids, rows, made_by=NAME)
    for reader in program.graph.nodes:
        place = CachedScan.PATH if isinstance(reader.target, CachedScan) else PATH_ARGUMENT.get(reader.target)
        if place is not None:
            reader.update_arg(place, path)
    program.graph.lint()
    program.graph_module.recompile()
    *plain, caches = program.parameters
    names = (*plain[:4], path.name, *plain[4:], caches)
    leaves = tuple(node.name for node in program.placeholders)
    count = len(names) - 1
    in_spec = pytree.tree_structure(((*leaves[:count], leaves[count:]), {}))
    signed = replace(program, in_spec=in_spec, parameters=names)
    return replace(step, program=signed, is_tree=True)


Pair = tuple[fx.Node, fx.Node]
Holder = Pair | fx.Node


def _holders(found: SequenceAnalysis) -> list[Holder]:
    """Who keeps a state, in graph order: (key, value) of an attention, once where layers share them, or a carried
    node."""
    holders = [node if node in found.carried else (node.args[1], node.args[2]) for node in found.looking_back]
    return list(dict.fromkeys(holders))  # type: ignore[arg-type]  # the analysis saw that both are nodes


def _check_states(found: SequenceAnalysis) -> Refusal | None:
    """A mask that counts positions needs every position: it has no place in a ring. A cache has one dtype."""
    for attention in found.attentions:
        key, value = (tensor_of(node) for node in attention.args[1:3])  # type: ignore[arg-type]
        if key.dtype != value.dtype:
            return Refusal(f"keys are {key.dtype} and values {value.dtype}: a cache has one dtype", attention)
        if attention.args[4] == "window" and attention.args[3] is not None:
            return Refusal(
                "a tensor mask on top of a window: positions that left the ring have no entry", attention
            )
    return None


def _widest(found: SequenceAnalysis, pair: Pair) -> fx.Node:
    """The reader of a pair that decides what is kept."""
    readers = [attention for attention in found.attentions if attention.args[1:3] == pair]
    return max(readers, key=lambda reader: (reader.args[4] == "causal", reader.args[5]))


def _describe(found: SequenceAnalysis, holder: Holder) -> tuple[LayerState, ...]:
    if isinstance(holder, fx.Node):
        return tuple(
            LayerState(holder.name, state.kind, state.window, 1, state.features, 0, state.dtype, state.reach)
            for state in describe_carried(found, holder)
        )
    widest = _widest(found, holder)
    state = _describe_pair(widest)
    return (replace(state, mask_proof=state.mask_proof + _describe_mask(found, widest)),)


def _describe_mask(found: SequenceAnalysis, attention: fx.Node) -> str:
    """How a step has the mask that stays a tensor beside the proved one, if there is one."""
    mask = attention.args[3]
    if not isinstance(mask, fx.Node):
        return ""
    if attention in found.key_masks:
        return f"; {mask.name} is decided by the key's position alone: computed for the stored positions"
    if attention in found.pair_masks:
        return f"; {mask.name} is decided by two positions alone: computed for new rows and stored positions"
    return f"; {mask.name} is the same for all positions"


def _describe_pair(widest: fx.Node) -> LayerState:
    """What `widest` keeps of its keys and values."""
    key, value = (tensor_of(node) for node in widest.args[1:3])  # type: ignore[arg-type]
    kind, window = str(widest.args[4]), widest.args[5]
    return LayerState(
        node=widest.name,
        kind=kind,
        window=int(window) if kind == "window" else 0,  # type: ignore[arg-type]
        heads=int(key.shape[1]),
        key_features=int(key.shape[3]),
        value_features=int(value.shape[3]),
        dtype=key.dtype,
        mask_proof=str(widest.meta.get("mask_proof", "")),
    )


def _describe_crosses(found: SequenceAnalysis) -> tuple[LayerState, ...]:
    """The cross attentions that read an encoder; what they keep grows with the source, not with the text."""
    readers = [node for node in found.crosses if node.args[1] in found.encoded]
    return tuple(replace(_describe_pair(node), kind="cross", window=0) for node in readers)


class _StepWriter:
    """Writes the step graph behind its inputs."""

    def __init__(
        self, found: SequenceAnalysis, source: fx.GraphModule, inputs: StepInputs,
        caches: Mapping[Holder, tuple[fx.Node, ...]], encoded: Mapping[fx.Node, fx.Node],
    ) -> None:  # fmt: skip
        self.found, self.source, self.inputs = found, source, inputs
        self.graph = inputs.ids.graph
        self.caches: dict[Any, tuple[fx.Node, ...]] = dict(caches)
        self.appended: dict[Any, tuple[fx.Node, ...]] = {}
        self.by_key: StepCopier | None = None
        self.pairs: PairWriter | None = None
        known = {found.tokens: inputs.packed, **encoded}
        self.rows = StepCopier(found, source, self.graph, inputs.length, inputs.flat_positions, known)
        for attention in found.attentions:
            operands: Any = attention.args[:3]
            self.rows.stands[attention] = Stand(operands, partial(self._attention, attention))
        cross = CrossWriter(self.rows, inputs, self._by_sequence)
        self.rows.stands.update({node: cross.stand(node) for node in found.crosses})
        carried = {node: self.caches[node] for node in found.carried}
        scope = CarriedScope(self.rows, inputs, carried, self.appended)
        self.rows.stands.update(stands_of_carried(scope, found))

    def write(self) -> list[fx.Node]:
        """The outputs: logits of the chosen rows, then the caches."""
        logits = self._chosen_logits()
        # An attention that the logits do not read has a cache all the same: the signature is that of the states.
        for node in self.found.looking_back:
            self.rows.copy(node)
        return [logits, *(held for holder in self.caches for held in self.appended[holder])]

    def _attention(self, attention: fx.Node) -> fx.Node:
        """Append the new rows, attend to the cache, and go back to packed rows."""
        make = partial(self.rows.make, like=attention)
        query, key, value, _, kind, window, scale, soft_cap, *sinks = attention.args
        pair: Any = (key, value)
        if pair not in self.appended:
            self.appended[pair] = tuple(
                make(APPEND, cache, self._by_sequence(self.rows.known[new], attention), self.inputs.past)
                for cache, new in zip(self.caches[pair], pair, strict=True)
            )
        keys, values = self.appended[pair]
        mask = self._key_mask(attention)
        read = self._by_sequence(self.rows.known[query], attention)  # type: ignore[index]
        same = [self.rows.copy(sink) for sink in sinks if isinstance(sink, fx.Node)]
        options = (kind, window if kind == "window" else 0, scale, soft_cap, *same)
        mixed = make(CACHED_ATTENTION, read, keys, values, self.inputs.past, None, mask, *options)
        _, heads, _, features = tensor_of(mixed).shape
        packed = make(
            aten.reshape.default, make(aten.permute.default, mixed, HEADS_TO_ROWS),
            [1, self.inputs.length, int(heads), int(features)],
        )  # fmt: skip
        return make(aten.permute.default, packed, HEADS_TO_ROWS)

    def _by_sequence(self, packed: fx.Node, like: fx.Node) -> fx.Node:
        """[1, H, B * T, D] as [B, H, T, D]."""
        make = partial(self.rows.make, like=like)
        _, heads, _, features = tensor_of(packed).shape
        shape = [self.inputs.batch, self.inputs.new, int(heads), int(features)]
        rows = make(aten.reshape.default, make(aten.permute.default, packed, HEADS_TO_ROWS), shape)
        return make(aten.permute.default, rows, HEADS_TO_ROWS)

    def _key_mask(self, attention: fx.Node) -> fx.Node | None:
        """A mask by the position of the key, computed again for all positions that the cache has room for."""
        mask = attention.args[3]
        if not isinstance(mask, fx.Node):
            return None
        if attention not in self.found.key_masks and attention not in self.found.pair_masks:
            copy: fx.Node = self.rows.copy(mask)
            return copy
        if self.by_key is None:
            self.by_key = self._key_copier(attention)
        if attention in self.found.pair_masks:
            self.pairs = self.pairs or PairWriter(self.rows, self.by_key, self.inputs)
            return self.pairs.write(self.found.pair_masks[attention])
        by_key: fx.Node = self.by_key.copy(mask)
        return by_key

    def _key_copier(self, attention: fx.Node) -> StepCopier:
        """Copies with one row per slot of a cache that keeps everything; all of these have one capacity."""
        make = partial(self.rows.make, like=attention)
        # The cache, not what is appended to it: sizes must not wait for rows.
        cache = self.caches[(attention.args[1], attention.args[2])][0]
        capacity = make(aten.sym_size.int, cache, 2)
        places = make(aten.arange.default, capacity, device=tensor_of(cache).device)
        if self.found.limit is not None:
            places = make(aten.clamp.default, places, None, self.found.limit - 1)
        return StepCopier(self.found, self.source, self.graph, capacity, places, self._shared())

    def _shared(self) -> dict[fx.Node, Any]:
        """Copies that do not follow the sequence, and so serve any number of rows."""
        along, symbol = self.found.along, self.found.symbol

        def follows(node: fx.Node) -> bool:
            value = node.meta.get("val")
            return isinstance(value, torch.SymInt) and symbol in value.node.expr.free_symbols

        return {
            node: copy for node, copy in self.rows.known.items() if node not in along and not follows(node)
        }

    def _chosen_logits(self) -> fx.Node:
        """The logits [1, R, V]: everything behind what looks back last runs for the chosen rows only."""
        found, inputs = self.found, self.inputs
        cut = _find_cut(found)
        axis = found.along[cut].axis
        rows = self.rows.make(aten.index_select.default, self.rows.copy(cut), axis, inputs.rows, like=cut)
        places = self.rows.make(aten.index_select.default, inputs.flat_positions, 0, inputs.rows, like=cut)
        known = {**self._shared(), cut: rows}
        copier = StepCopier(found, self.source, self.graph, inputs.chosen, places, known)
        logits: fx.Node = copier.copy(found.logits)
        return logits


def _find_cut(found: SequenceAnalysis) -> fx.Node:
    """The earliest value behind what looks back last through which alone the logits follow the tokens: only the chosen
    rows of it are ever read."""
    needed = _ancestors(found.logits)
    order = [node for node in found.logits.graph.nodes if node in needed]
    place = {node: number for number, node in enumerate(order)}
    last_use = {
        node: max((place[user] for user in node.users if user in place), default=-1) for node in order
    }
    start = max((place[node] for node in (*found.looking_back, *found.crosses) if node in place), default=0)
    reach = max((last_use[node] for node in order[:start] if _has_tokens(found, node)), default=-1)
    for number, node in enumerate(order[start:], start):
        if not _has_tokens(found, node):
            continue
        # What has several results is read through its pieces, so that it cannot be the only way.
        if is_tensor(node) and reach <= number and shape_of(node)[found.along[node].axis] == found.symbol:
            cut: fx.Node = node
            return cut
        reach = max(reach, last_use[node])
    return found.logits


def _has_tokens(found: SequenceAnalysis, node: fx.Node) -> bool:
    return node in found.along and found.along[node].tokens


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen = {node}
    pending = [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


def _with_signature(
    program: Program, step: fx.GraphModule, inputs: StepInputs, encoded: Sequence[str]
) -> Program:
    """The step program's pytree signature and size ranges."""
    caches = tuple(node.name for pair in inputs.caches for node in pair)
    plain = [*(node.name for node in inputs.all_inputs if node.name not in caches), *encoded]
    sizes = [SizeRange("ids", 0, 1, None), SizeRange("ids", 1, 1, None), SizeRange("rows", 0, 1, None)]
    sizes += [SizeRange(name, 2, 1, None) for name in caches]
    return Program(
        step,
        in_spec=pytree.tree_structure(((*plain, caches), {})),
        out_spec=pytree.tree_structure(("logits", caches)),
        name=f"{program.name} step",
        parameters=(*plain, "caches"),
        sizes=tuple(sizes),
        guards=program.guards,
    )
