"""Leave whole layers out, so that what stays is a smaller model with the same tokens and the same weights.

before:  x1 = layer_0(x0);  x2 = layer_1(x1);  x3 = layer_2(x2)
after:   x1 = layer_0(x0);  x3 = layer_2(x1)
why:     a draft for speculative decoding without a second checkpoint; layers in the middle change the stream least
legal:   what depends on the tokens passes through one value before and one after the layer (the residual stream), of
         the same shape and dtype; one layer stays; the numbers name layers that there are
source:  Zhang et al., Draft & Verify (2024); Men et al., ShortGPT (2024), for which layers to leave out

Layers are found by the data flow, not by names: a layer begins at the last single value of the stream before an
attention and ends where the next one begins. It wants a canonical graph with attention recognized.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.edit import erase_dead, replace
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Exactness, Refusal

NAME: Final = "drop_layers"
EXACTNESS: Exactness = "lossy"
ATTENTION: Final[Any] = torch.ops.torchweld.attention.default


@dataclass(frozen=True)
class Layer:
    """One layer: the values of the residual stream before and after it."""

    start: fx.Node
    end: fx.Node


def drop_layers(program: Program, numbers: Collection[int]) -> Program | Refusal:
    """The program without the layers of these numbers (from 0, in the order of the graph), or why not.

    `program` stays as it is; tensors are shared.
    """
    copy = program.copied()
    layers = find_layers(copy)
    if isinstance(layers, Refusal):
        return layers
    refusal = _check(layers, numbers)
    if refusal is not None:
        return refusal
    # From the end: what follows a dropped layer reads its start, which may be the end of another dropped one.
    for number in sorted(set(numbers), reverse=True):
        replace(layers[number].end, layers[number].start)
    erase_dead(copy.graph)
    copy.graph_module.recompile()
    return copy


def find_layers(program: Program) -> tuple[Layer, ...] | Refusal:
    """The layers of a causal language model, in order; a refusal where the stream is not one value between them.

    The end of the last layer is taken to lie as many single values behind its start as in the layer before; where that
    cannot be, the last layer is not among them.
    """
    stream = _stream(program)
    if not stream:
        return Refusal("nothing depends on the tokens", program.graph.output_node())
    single = _single_values(stream)
    starts = [place for place, segment in enumerate(_segments(stream, single)) if any(map(_attends, segment))]
    attentions = [node for node in stream if _attends(node)]
    if len(starts) != len(attentions) or len(starts) < 2:
        blame = attentions[0] if attentions else program.graph.output_node()
        return Refusal(
            f"{len(attentions)} attentions in {len(starts)} places between which the stream is a single value; "
            "expected two at least, each in a place of its own",
            blame,
        )
    last = starts[-1] + starts[-1] - starts[-2]
    ends = [*starts[1:], *([last] if last < len(single) else [])]
    layers = tuple(Layer(single[a], single[b]) for a, b in zip(starts, ends, strict=False))
    return layers if _alike(layers[-1]) else layers[:-1]


def _check(layers: Sequence[Layer], numbers: Collection[int]) -> Refusal | None:
    """See `legal` above."""
    for number in numbers:
        if not 0 <= number < len(layers):
            return Refusal(f"there is no layer {number} to drop; expected 0 to {len(layers) - 1}")
        if not _alike(layers[number]):
            return Refusal(
                f"layer {number} gives a value of another shape or dtype than it takes", layers[number].end
            )
    if len(set(numbers)) >= len(layers):
        return Refusal(
            f"all {len(layers)} layers are to be dropped; expected one at least to stay", layers[0].start
        )
    return None


def _alike(layer: Layer) -> bool:
    """Has the stream the same dtype and shape before and after?"""
    before, after = layer.start.meta["val"], layer.end.meta["val"]
    return bool(before.dtype == after.dtype and tuple(before.shape) == tuple(after.shape))


def _attends(node: fx.Node) -> bool:
    return node.target is ATTENTION


def _stream(program: Program) -> list[fx.Node]:
    """Every tensor that depends on the values of the inputs (not merely on their sizes), in graph order."""
    found: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        is_value = isinstance(node.meta.get("val"), torch.Tensor)
        if is_value and (node.op == "placeholder" or any(source in found for source in node.all_input_nodes)):
            found[node] = None
    return list(found)


def _single_values(stream: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes behind which nothing earlier of the stream is read any more, in order: all goes through them."""
    place = {node: number for number, node in enumerate(stream)}
    output = len(stream)
    reads = [max((place.get(user, output) for user in _readers(node)), default=-1) for node in stream]
    single, farthest = [], -1
    for number, node in enumerate(stream):
        if farthest <= number:
            single.append(node)
        farthest = max(farthest, reads[number])
    return single


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users that read the values of a node: tensors and the output, not sizes."""
    return [
        user for user in node.users if user.op == "output" or isinstance(user.meta.get("val"), torch.Tensor)
    ]


def _segments(stream: Sequence[fx.Node], single: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """segments[i]: what of the stream lies behind single[i], up to and with single[i + 1]."""
    segments: list[list[fx.Node]] = [[] for _ in single]
    number = -1
    following = dict(zip(single, range(len(single)), strict=True))
    for node in stream:
        if number >= 0:
            segments[number].append(node)
        number = following.get(node, number)
    return segments
