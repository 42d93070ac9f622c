"""Does a model decode with a derived cache, and is it right? The column "decodes" of docs/coverage.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchweld.decoding.cached import CachedModel, NotDecodable
from torchweld.graph.capture_causal import capture_causal
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.compare import compare
from torchweld.optimizer.commands.decode import explain_decoding
from torchweld.optimizer.verify import Oracle

PROMPT = 4
"""Tokens of the prompt; what is left comes in steps of 1, 3, 1, 3 ... tokens."""
MOST_KERNELS = 8


@dataclass(frozen=True)
class Decoding:
    """How one model decodes: the states in words and the error against float64, or the refusal.

    ok: it decodes right, in at most `MOST_KERNELS` kernels per layer, or it was refused.
    """

    text: str
    ok: bool
    kernels_per_layer: int = 0

    @property
    def cell(self) -> str:
        """For the table."""
        return self.text if self.ok else f"WRONG: {self.text}"


def cover_decoding(model: nn.Module, ids: Tensor) -> Decoding:
    """Decode `ids` int64 [B, S], S > `PROMPT`, piece by piece, and compare every logit with the float64 run."""
    try:
        program = capture_causal(model, ids)
    except CaptureError as problem:
        return Decoding(f"no, not captured: {str(problem).splitlines()[0]}", ok=True)
    try:
        cached = CachedModel(program)
    except NotDecodable:
        return Decoding(f"no: {explain_decoding(program).refusal}", ok=True)
    # The tokens, and flags such as use_cache.
    flat = [ids if isinstance(node.meta.get("val"), Tensor) else False for node in program.placeholders]
    oracle = Oracle(program, flat)
    found = decode_in_pieces(cached, ids)
    logits = next(value for value in oracle.reference if isinstance(value, Tensor))
    eager = next(value for value in oracle.eager if isinstance(value, Tensor))
    start = PROMPT - 1
    verdict = compare(
        (found,), (logits[:, start:],), dtype_of_compute=oracle.dtype, eager=(eager[:, start:],)
    )
    kernels = cached.compiled().report.kernels_per_layer
    names = [f"window {state.window}" if state.kind == "window" else state.kind for state in cached.states]
    kinds = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    limit = "" if cached.max_length is None else f"; {cached.max_length} positions"
    text = f"yes: {kinds}{limit} ({verdict.max_relative_error:.1e})"
    return Decoding(text, verdict.ok and kernels <= MOST_KERNELS, kernels)


def decode_in_pieces(cached: CachedModel, ids: Tensor) -> Tensor:
    """Logits [B, S - PROMPT + 1, V] of the prompt's last token and of all that follow."""
    parts = [cached.prefill(ids[:, :PROMPT].tolist())[:, None]]
    start = PROMPT
    while start < ids.shape[1]:
        end = start + (1 if len(parts) % 2 else 3)
        parts.append(cached.step(ids[:, start:end].contiguous(), logits_for="all"))
        start = end
    return torch.cat(parts, 1)
