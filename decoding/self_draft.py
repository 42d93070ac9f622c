"""A draft made of the model itself: the layers that change the stream least are left out.

    draft = self_draft(program, ids, drop=8)              a DraftModel: same tokens, same weights in memory
    generate(model, prompt, proposer=draft)

How much a layer changes the stream is measured on a text: 1 - cosine of what goes in and what comes out, per position.
The first and the last layer stay, they are the least alike.

source: Men et al., ShortGPT (2024), block influence; Zhang et al., Draft & Verify (2024)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torchweld.decoding.cached import CachedModel, normalised
from torchweld.decoding.draft_model import DraftModel
from torchweld.decoding.step_model import DecodingError
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence import describe_refusal
from torchweld.optimizer.compile import Options
from torchweld.passes.drop_layers import drop_layers, find_layers


def self_draft(
    program: Program,
    ids: Tensor,
    *,
    drop: int | None = None,
    options: Options | None = None,
    max_length: int | None = None,
    confidence: float = 0.4,
) -> DraftModel:
    """A draft for the model of `program`. ids: a text to choose layers on, int64 [1, S]; drop: how many (half of all).

    Raises DecodingError where the layers are not to be told apart or so many cannot go; NotDecodable as CachedModel.
    """
    draft = draft_program(program, ids, drop)
    return DraftModel(CachedModel(draft, options=options, max_length=max_length), confidence=confidence)


def draft_program(program: Program, ids: Tensor, drop: int | None = None) -> Program:
    """The program without the `drop` layers that matter least for `ids`; see `self_draft`."""
    whole = normalised(program)
    influence = layer_influence(whole, ids)
    count = len(influence) // 2 if drop is None else drop
    inner = range(1, len(influence) - 1)
    if not 0 < count <= len(inner):
        raise DecodingError(
            f"{count} layers of {program.name} are to be dropped; expected 1 to {len(inner)} (not the ends)"
        )
    dropped = sorted(inner, key=lambda number: influence[number])[:count]
    result = drop_layers(whole, dropped)
    if isinstance(result, Refusal):
        raise DecodingError(f"no draft can be made of {program.name}: {describe_refusal(result)}")
    return result


def layer_influence(program: Program, ids: Tensor) -> tuple[float, ...]:
    """Per layer 1 - the mean cosine between its input and its output, over the positions of `ids` int64 [1, S].

    program: normalised. Raises DecodingError where no layers are found.
    """
    layers = find_layers(program)
    if isinstance(layers, Refusal):
        raise DecodingError(f"no draft can be made of {program.name}: {describe_refusal(layers)}")
    ends = {layer.start for layer in layers} | {layer.end for layer in layers}
    values = _values_of(program, ids, ends)

    def influence(start: Tensor, end: Tensor) -> float:
        return 1.0 - float(torch.cosine_similarity(start.double(), end.double(), dim=-1).mean())

    return tuple(influence(values[layer.start], values[layer.end]) for layer in layers)


def _values_of(program: Program, ids: Tensor, nodes: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """The values of these nodes when the program runs on `ids`."""
    values: dict[fx.Node, Tensor] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in nodes:
                values[n] = result
            return result

    with torch.inference_mode():
        Keeping(program.graph_module).run(*program.flatten_inputs((ids,), {}))
    return values
