"""Decide what a mask is, by proof over all sizes.

A mask is evaluated symbolically (`graph/positions.py`) at batch b, head h, query t and key s. If its value
depends only on the distance d = (t + keys - queries) - s, the set of visible distances is known exactly, and

    all d           is mask kind "none"
    d >= 0          is "causal"
    0 <= d < w      is "window" of w

for every size, or for the one size that is possible where sizes are fixed. Every other mask stays a tensor.
A mask that looks causal in one example is not enough, and no example is ever run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import sympy
from torch import fx

from torchweld.graph.bands import Bands, Interval
from torchweld.graph.match import aten, constant_tensor, dtype_of, is_call, shape_of
from torchweld.graph.positions import Extents, Prover, Unprovable
from torchweld.passes.match_attention import NEVER_A_SCORE, Mask, hidden_below
from torchweld.passes.show_proof import show_parts


@dataclass(frozen=True)
class Verdict:
    """Mask kind and window for torchweld::attention, the masks that stay tensors, and how it was proved."""

    kind: str
    window: int
    kept: tuple[Mask, ...]
    proof: str
    name: str = ""
    """For people: none, causal, window 8, prefix, tensor; what stays beside a proof as in "causal and padding"."""


@dataclass(frozen=True)
class _Finding:
    """What is known of one mask: the visible distances, or why they are not known (`visible` is None).

    `finite`: hidden scores get a finite number, so that a query which sees no key mixes all of them alike.
    """

    mask: Mask
    visible: tuple[Interval, ...] | None
    finite: bool
    sentence: str


def prove_mask(prover: Prover, masks: Sequence[Mask], *, causal: bool = False) -> Verdict:
    """The mask kind that all proved masks together amount to, and the masks that are not proved."""
    verdict = _prove(prover, masks, causal)
    return replace(verdict, name=name_mask(prover, verdict))


def name_mask(prover: Prover, verdict: Verdict) -> str:
    """What the mask is, in words; nothing is decided by it."""
    kind = f"window {verdict.window}" if verdict.kind == "window" else verdict.kind
    rest = list(dict.fromkeys(_name_kept(prover, mask) for mask in verdict.kept))
    if verdict.kind == "none" and rest:
        return " and ".join(rest)
    return " and ".join([kind, *rest])


def _name_kept(prover: Prover, mask: Mask) -> str:
    """padding: hides keys, whoever asks; bias: adds numbers; prefix: causal, or a key that all see; else tensor."""
    node: Any = mask.node
    if is_call(node, aten.expand.default):
        node = node.args[0]
    if not mask.is_boolean:
        return "bias" if mask.hidden is None else "tensor"
    if is_call(node, aten.logical_or.default) and not mask.inverted:
        parts = [part for part in node.args if isinstance(part, fx.Node)]
        seen = [_examine(prover, Mask(part)).visible for part in parts]
        if ((0.0, math.inf),) in seen and any(_by_key(part) for part in parts):
            return "prefix"
    return "padding" if _by_key(node) else "tensor"


def _by_key(node: fx.Node) -> bool:
    """Is there one entry per key, the same for every query and head?"""
    shape = shape_of(node)
    return len(shape) < 2 or (shape[-2] == 1 and shape[-1] != 1 and (len(shape) < 3 or shape[-3] == 1))


def _prove(prover: Prover, masks: Sequence[Mask], causal: bool) -> Verdict:
    findings: list[_Finding] = []
    for mask in masks:
        whole = _examine(prover, mask)
        parts = [whole] if whole.visible is not None else [_examine(prover, part) for part in split(mask)]
        # Parts are only worth having if one of them goes away.
        findings += parts if any(part.visible is not None for part in parts) else [whole]
    known = [finding for finding in findings if finding.visible is not None]
    kept = tuple(finding.mask for finding in findings if finding.visible is None)
    shown = [finding.visible for finding in known if finding.visible is not None]
    reach = classify(intersect([*shown, ((0, math.inf),)] if causal else shown), prover.extents)
    sentences = [finding.sentence for finding in findings] + [
        "is_causal with as many queries as keys shows d >= 0"
    ] * causal
    if isinstance(reach, str):
        return _all_kept(masks, f"{reach}, which no mask kind expresses", causal)
    if reach is not None and any(finding.finite for finding in known) and not _always_some(prover, kept):
        return _all_kept(masks, "a query may see no key, and the source then mixes hidden ones", causal)
    proof = "; ".join(sentences) or "no mask in the source"
    if reach is None:
        return Verdict("none", 0, kept, proof)
    if len(sentences) == 1:  # it names the range already
        proof += f" for every size, {DISTANCE}"
    else:
        proof += f"; together {_show(reach)} for every size, {DISTANCE}"
    steps = [show_parts(prover, finding.mask) for finding in known]
    proof = ": ".join([proof, *filter(None, ["; ".join(filter(None, steps))])])
    return (
        Verdict("causal", 0, kept, proof)
        if reach == math.inf
        else Verdict("window", int(reach) + 1, kept, proof)
    )


DISTANCE: Final = "with d = query position - key position"


def _show(reach: float) -> str:
    return "d >= 0" if reach == math.inf else f"0 <= d <= {int(reach)}"


def _all_kept(masks: Sequence[Mask], reason: str, causal: bool) -> Verdict:
    return Verdict("causal" if causal else "none", 0, tuple(masks), f"every mask stays a tensor: {reason}")


def _always_some(prover: Prover, kept: Sequence[Mask]) -> bool:
    """Does every query see at least itself, whatever the kept masks are? There must be no more queries than
    keys, and nothing that is added may come near "hidden"."""
    enough_keys = prover.is_nonnegative(
        sympy.sympify(prover.extents.keys) - sympy.sympify(prover.extents.queries)
    )
    lows = [None if mask.is_boolean else lower_bound(prover.graph_module, mask.node) for mask in kept]
    return enough_keys and all(low is not None and low > NEVER_A_SCORE / 2 for low in lows)


def lower_bound(graph_module: fx.GraphModule, node: object) -> float | None:
    """A number that no entry of `node` is below, from constants, positions and what only moves them; None
    if unknown."""
    if isinstance(node, (int, float)):
        return float(node)
    stored = constant_tensor(graph_module, node)
    if stored is not None:
        return float(stored.amin()) if stored.numel() else None
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if is_call(node, aten.arange.default):
        return 0.0
    if is_call(node, aten.ones_like.default, aten.ones.default):
        return 1.0
    if is_call(node, *MOVES):
        return lower_bound(graph_module, node.args[0])
    if is_call(node, aten.cumsum.default):  # at least the first summand, if none is negative
        low = lower_bound(graph_module, node.args[0])
        return low if low is not None and low >= 0 else None
    if is_call(node, aten.sub.Tensor) and isinstance(node.args[1], (int, float)) and not node.kwargs:
        low = lower_bound(graph_module, node.args[0])
        return None if low is None else low - node.args[1]
    if is_call(node, aten.mul.Tensor, aten.add.Tensor) and len(node.args) == 2 and not node.kwargs:
        low, other = (lower_bound(graph_module, part) for part in node.args)
        if low is None or other is None:
            return None
        if is_call(node, aten.add.Tensor):
            return low + other
        return low * other if low >= 0 and other >= 0 else None
    return None


MOVES: Final = (
    aten.reshape.default,
    aten.permute.default,
    aten.expand.default,
    aten.repeat.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.gather.default,
    aten.embedding.default,
)
"""Ops that only pick entries of their first argument."""


def intersect(sets: Sequence[Sequence[Interval]]) -> tuple[Interval, ...]:
    """Distances that are in every set."""
    common: tuple[Interval, ...] = ((-math.inf, math.inf),)
    for intervals in sets:
        pairs = [(max(a, c), min(b, d)) for a, b in common for c, d in intervals]
        common = tuple(sorted((low, high) for low, high in pairs if low <= high))
    return common


def split(mask: Mask) -> list[Mask]:
    """An added mask as a sum of masks: a + b, and where(visible, x, hidden) = x with a boolean mask on
    top."""
    node = mask.node
    if mask.is_boolean:
        return _split_conjunction(mask)
    if is_call(node, aten.reshape.default) and isinstance(node.args[0], fx.Node):
        source, shape = node.args[0], shape_of(node)
        if shape == (*[1] * (len(shape) - len(shape_of(source))), *shape_of(source)):
            parts = split(Mask(source))
            return parts if len(parts) > 1 else [mask]
    if is_call(node, aten.add.Tensor) and len(node.args) == 2 and not node.kwargs:
        return [part for term in node.args if isinstance(term, fx.Node) for part in split(Mask(term))]
    if is_call(node, aten.where.ScalarOther, aten.where.ScalarSelf):
        inverted = is_call(node, aten.where.ScalarSelf)
        visible: Any = node.args[0]
        number, rest = (node.args[1], node.args[2]) if inverted else (node.args[2], node.args[1])
        if (
            isinstance(number, (int, float))
            and number <= hidden_below(dtype_of(node))
            and isinstance(rest, fx.Node)
        ):
            hidden = None if number == -math.inf else float(number)
            return [Mask(visible, inverted, hidden), *split(Mask(rest))]
    return [mask]


def _split_conjunction(mask: Mask) -> list[Mask]:
    """visible = a and b as two masks, where hidden means -inf: else a query that sees no key would notice."""
    if mask.hidden is not None or mask.inverted or not is_call(mask.node, aten.logical_and.default):
        return [mask]
    return [
        part
        for term in mask.node.args
        if isinstance(term, fx.Node)
        for part in split(replace(mask, node=term))
    ]


def _examine(prover: Prover, mask: Mask) -> _Finding:
    """Try to prove one mask."""
    name = mask.node.name
    try:
        bands = prover.scores_value(mask.node)
    except Unprovable as reason:
        return _Finding(mask, None, False, f"{name} stays a tensor: {reason}")
    visible = visible_distances(mask, bands)
    if visible is None:
        return _Finding(mask, None, False, f"{name} stays a tensor: it adds numbers to visible scores")
    hidden = [] if mask.is_boolean else [value for value in bands.values if value != 0]
    finite = mask.hidden is not None or any(value != -math.inf for value in hidden)
    reach = classify(visible, prover.extents)
    found = "hides nothing" if reach is None else reach if isinstance(reach, str) else f"shows {_show(reach)}"
    return _Finding(mask, visible, finite, f"{name} {found}")


def visible_distances(mask: Mask, bands: Bands) -> tuple[Interval, ...] | None:
    """Distances that the mask shows; None if it adds something else than nothing or "hidden"."""
    if mask.is_boolean:
        return bands.intervals(lambda value: bool(value) != mask.inverted)
    limit = hidden_below(dtype_of(mask.node))
    if any(value != 0 and not value <= limit for value in bands.values):
        return None
    return bands.intervals(lambda value: value == 0)


def classify(visible: Sequence[Interval], extents: Extents) -> float | str | None:
    """Greatest visible distance of a causal (inf) or window mask, None if all is visible, else what speaks
    against it."""
    least, most = -math.inf, math.inf
    if isinstance(extents.queries, int) and isinstance(extents.keys, int):
        least, most = 1 - extents.queries, extents.keys - 1  # distances that occur
    clipped = [(max(low, least), min(high, most)) for low, high in visible if low <= most and high >= least]
    if clipped == [(least, most)]:
        return None
    if len(clipped) != 1:
        return f"shows {len(clipped)} ranges of distances"
    low, high = clipped[0]
    if low != 0:
        return "shows distances that do not begin at 0"
    return math.inf if high == most else high
