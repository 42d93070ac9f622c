"""From a captured causal program to its compiled step, shared by decoding and `explain --decode`."""

from __future__ import annotations

from typing import Final

import torch

from torchweld import passes
from torchweld.graph.program import Program
from torchweld.graph.rewrite import PassOutcome, run_pass
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.passes.step_program import StepProgram

TYPICAL_PAST: Final = 256
"""Positions in the cache for which fusions are priced."""


def normalise(program: Program) -> tuple[Program, list[PassOutcome]]:
    """A copy of `program` in the spelling that `derive_step` reads, and what each pass did; an attention mask over
    tokens is all ones there."""
    from torchweld.passes.fill_padding_mask import fill_padding_mask  # as the passes, not before it is needed

    copy = fill_padding_mask(program).copied()
    return copy, [run_pass(copy.graph_module, pass_) for pass_ in (*passes.CANONICALIZE, *passes.RECOGNIZE)]


def compile_step(step: StepProgram, options: Options) -> Compiled:
    """Compiled for the call that comes most often: one token behind a past of some length."""
    examples = []
    for node in step.program.placeholders:
        value = node.meta["val"]
        if value.dim() == 4:
            # Only the shapes are read: one element stands for the whole past, or for the whole source.
            sizes = enumerate(value.shape)
            shape = [
                size if isinstance(size, int) else TYPICAL_PAST + 1 if axis else 1 for axis, size in sizes
            ]
            examples.append(torch.empty((), dtype=value.dtype).expand(shape))
        else:
            examples.append(torch.zeros((1,) * value.dim(), dtype=value.dtype))
    return compile_program(step.program, options=options, example_inputs=tuple(examples))
