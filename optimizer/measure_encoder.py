"""Measure what a precision costs an encoder on a text: the error and the angle of its output vectors.

The text is cut into windows, because an encoder sees all of a window: CALLS names batch and length of a call, for few
rows and for many (codegen/cpp_packed.py: precisions mean another arithmetic for up to 16 rows). The reference is the
module in float64 on the same windows, without capture (graph/float64.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchweld.codegen.cpp_packed import PRECISIONS
from torchweld.graph.float64 import to_float64
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.optimizer.measure_quality import QualityError
from torchweld.optimizer.report_quality import EncoderQuality

CALLS: Final = ((1, 8), (4, 128))
"""Batch and length of a call: 8 rows, as of a short question, and 512."""


def measure_encoder(
    module: nn.Module,
    program: Program,
    ids: Tensor,
    *,
    text: str,
    options: Options | None = None,
    precisions: Sequence[str] = PRECISIONS,
    calls: Sequence[tuple[int, int]] = CALLS,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[EncoderQuality, ...]:
    """Compare every precision with float64 on the tokens int64 [S] of `text` (its name, for the report).

    module: of (ids, attention mask) int64 [B, S] -> float [..., d]; program: captured from it. advance: told of tokens
    done, `work_of` of them.  Raises QualityError for a text that fills no call, BuildError where it cannot be compiled.
    """
    chosen = options or Options()
    references = {shape: _reference(module, ids, shape, advance) for shape in calls}
    found = []
    for precision in precisions:
        wanted = replace(chosen, precision=precision, strict=True)  # type: ignore[arg-type]
        compiled = compile_program(program, options=wanted)
        for shape, reference in references.items():
            ours = _vectors(_run(compiled, windows, advance) for windows in split_windows(ids, shape))
            found.append(_quality(precision, shape, ours, reference, _tokens(ids, shape), text))
    return tuple(found)


def work_of(
    tokens: int, precisions: Sequence[str] = PRECISIONS, calls: Sequence[tuple[int, int]] = CALLS
) -> int:
    """How many tokens `advance` hears of for a text."""
    whole = sum(tokens // (batch * length) * batch * length for batch, length in calls)
    return whole * (1 + len(precisions))


def split_windows(ids: Tensor, shape: tuple[int, int]) -> Iterator[Tensor]:
    """int64 [batch, length] of the text in order; what fills no call at its end is left out."""
    size = shape[0] * shape[1]
    for start in range(0, len(ids) - size + 1, size):
        yield ids[start : start + size].reshape(shape)


def _reference(
    module: nn.Module, ids: Tensor, shape: tuple[int, int], advance: Callable[[int], object]
) -> Tensor:
    def run(windows: Tensor) -> object:
        advance(windows.numel())
        return to_float64(module, (windows, torch.ones_like(windows)))

    if len(ids) < shape[0] * shape[1]:
        raise QualityError(f"the text has {len(ids)} tokens; expected at least {shape[0] * shape[1]}")
    return _vectors(run(windows) for windows in split_windows(ids, shape))


def _run(compiled: Compiled, windows: Tensor, advance: Callable[[int], object]) -> object:
    advance(windows.numel())
    return compiled.run(windows, torch.ones_like(windows))


def _vectors(results: Iterator[object]) -> Tensor:
    """The first tensor of every result as float64 vectors [n, d]."""
    tensors = [next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)) for result in results]
    return torch.cat([tensor.double().reshape(-1, tensor.shape[-1]) for tensor in tensors])


def _tokens(ids: Tensor, shape: tuple[int, int]) -> int:
    size = shape[0] * shape[1]
    return len(ids) // size * size


def _quality(
    precision: str, shape: tuple[int, int], ours: Tensor, reference: Tensor, tokens: int, text: str
) -> EncoderQuality:
    error = (ours - reference).norm(dim=-1) / reference.norm(dim=-1)
    cosine = torch.cosine_similarity(ours, reference, dim=-1, eps=0.0)
    return EncoderQuality(
        precision, shape[0] * shape[1], error.mean().item(), error.max().item(), cosine.mean().item(),
        cosine.min().item(), len(error), tokens, text,
    )  # fmt: skip
