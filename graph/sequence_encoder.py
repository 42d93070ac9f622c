"""Cross attention in the analysis of a decoder: every row reads all of another sequence, and none of its own.

What depends on other inputs than the tokens is an encoder's, whatever it is; it is computed once. Tokens may meet it in
attention alone, as keys, values and a mask which is the same for every row: then position t depends on position t of
the decoder and on the whole encoder, and no state grows with t.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from torchweld.graph.bands import Bands
from torchweld.graph.match import rank_of, shape_of
from torchweld.graph.positions import BATCH, HEAD, KEY, QUERY, Unprovable
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence import Along, Mixes, Scope, SequenceAnalysis, op_name


def choose_tokens(results: Mapping[fx.Node, SequenceAnalysis | Refusal]) -> SequenceAnalysis | Refusal:
    """Of the analyses by input the one that succeeds; it is the causal one. A refusal where that is none or several."""
    found = [result for result in results.values() if isinstance(result, SequenceAnalysis)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(result.tokens.name for result in found)
        return Refusal(f"{names} are both causal sequences: say by name which one are the tokens", None)
    refusals = {node: result for node, result in results.items() if isinstance(result, Refusal)}
    if len(refusals) == 1:
        return next(iter(refusals.values()))
    # The walk that came furthest is likely that of the tokens.
    last = max((refusal.node for refusal in refusals.values() if refusal.node is not None), default=None)
    reasons = "; ".join(
        f"with {node.name} as the tokens: {refusal.reason}" for node, refusal in refusals.items()
    )
    return Refusal(reasons, last)


def note_encoder(scope: Scope, node: fx.Node, found: Along | None) -> None:
    """Note what depends on an encoder alone; Mixes where tokens meet it outside of cross attention.

    found: the sequence axis of `node`. Sizes that the tokens share, such as the batch, are not the encoder's.
    """
    read = [source for source in node.all_input_nodes if source in scope.encoder]
    if not read or node in scope.crosses:
        return
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        shared = {scope.symbol, *sympy.sympify(shape_of(scope.tokens)[0]).free_symbols}
        if value.node.expr.free_symbols - shared:
            scope.encoder.add(node)
    elif found is not None and found.tokens:
        raise Mixes(
            f"{op_name(node)} mixes {read[0].name} of the encoder with the tokens, outside of attention"
        )
    elif not isinstance(value, (int, float, bool)):
        scope.encoder.add(node)


def is_cross(scope: Scope, attention: fx.Node) -> bool:
    """Are the keys and values of this attention the same for every row, whatever the tokens are?"""
    return not any(scope.of(operand) or operand in scope.set_aside for operand in attention.args[1:3])


def cross_attention(scope: Scope, node: fx.Node) -> Along:
    """Attention to an encoder, position by position of the query."""
    query: Any = node.args[0]
    mask, kind = node.args[3], node.args[4]
    along = scope.of(query)
    if along is None or along.axis != 2 or not along.tokens or not scope.is_whole(query, 2):
        raise Mixes("the query of this cross attention is not one row per token")
    if kind != "none":
        raise Mixes(f"a {kind} mask over keys that are not the decoder's: they have no place in its sequence")
    batch = shape_of(scope.tokens)[0]
    if batch == 1:
        raise Mixes(f"the batch of {scope.tokens.name} is fixed at 1, beside an encoder it must vary")
    for operand in (*node.args[1:3], mask):
        if not isinstance(operand, fx.Node):
            continue
        if operand is mask:
            _check_mask(scope, operand)
        if shape_of(operand)[0] not in (1, batch):
            reason = f"{operand.name} of this cross attention has a batch of its own, {shape_of(operand)[0]}"
            raise Mixes(f"{reason}: capture with as many texts for the encoder as for the decoder")
        if operand in scope.encoder:
            scope.encoded[operand] = None
    scope.crosses.append(node)
    return Along(2, tokens=True)


def _check_mask(scope: Scope, mask: fx.Node) -> None:
    """The mask of a cross attention is an encoder's, and the same for every row."""
    if mask in scope.set_aside:
        raise scope.set_aside[mask]
    along, rank = scope.of(mask), rank_of(mask)
    if along is not None and along.tokens:
        raise Mixes(f"the mask {mask.name} of this cross attention depends on the tokens")
    if along is not None and (along.axis != rank - 2 or not is_same_everywhere(scope, mask)):
        raise Mixes(f"the mask {mask.name} of this cross attention depends on the position in the decoder")
    if along is not None and mask not in scope.encoder:
        raise Mixes(f"the mask {mask.name} of this cross attention is as long as the text")
    if rank != 4:
        raise Mixes(f"the mask {mask.name} of this cross attention has {rank} axes; expected 4")


def is_same_everywhere(scope: Scope, node: fx.Node) -> bool:
    """Is a value with a sequence axis and no tokens the same at every position?"""
    moving = {source.node for source in scope.sources} | {table.node for table in scope.tables}
    seen, pending = {node}, [node]
    while pending:
        value = pending.pop()
        if _is_constant(scope, value):
            continue
        if value in moving or scope.along[value].tokens:
            return False
        for source in value.all_input_nodes:
            if source in scope.along and source not in seen:
                seen.add(source)
                pending.append(source)
    return True


def _is_constant(scope: Scope, node: fx.Node) -> bool:
    """Is this one number for every position, batch and size, such as `arange(S) >= 0`?"""
    shape, axis = shape_of(node), scope.along[node].axis
    if node in scope.encoder or len(shape) > 4 or not scope.is_whole(node, axis):
        return False
    others = iter((BATCH, HEAD, KEY))
    places = (
        QUERY if place == axis else sympy.Integer(0) if size == 1 else next(others)
        for place, size in enumerate(shape)
    )
    try:
        value = scope.prover.value(node, tuple(places))
    except Unprovable:
        return False
    return value.single is not None if isinstance(value, Bands) else bool(value.is_Integer)
