"""Run a batch of sentences of different lengths without what stands behind their ends.

A batch is cut into groups of like lengths, each run as a call of its own with as many columns as its longest sentence
has (in steps of 16); results are put together again. Only where graph/padding.py proved that padding does not reach the
results; only for masks that are 1 up to the end of a sentence and 0 behind it; and only if at least a tenth of the work
goes away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from torchweld.graph.padding import Padding

STEP: Final = 16
"""Lengths are rounded up to a multiple: few different sizes, and whole tiles."""
CALL_TOKENS: Final = 64
"""What one more call costs, in tokens (MiniLM: 1.8 ms for a call of 16 tokens, 25 to 60 ms for 1,024)."""
WORTH: Final = 0.9
"""The cost of the groups over that of the whole batch, at most."""

Group = tuple[tuple[int, ...], int]


def run_without_padding(
    run: Callable[..., tuple[object, ...]], flat_inputs: Sequence[object], padding: Padding
) -> tuple[object, ...]:
    """As `run(*flat_inputs)`, whose inputs are [B, S] and whose results are [B, ...]; fewer columns where that pays."""
    mask = flat_inputs[padding.mask]
    inputs = [value for value in flat_inputs if isinstance(value, Tensor)]
    fits = len(inputs) == len(flat_inputs) == len(padding.cut)
    if not fits or not isinstance(mask, Tensor) or any(value.shape != mask.shape for value in inputs):
        return run(*flat_inputs)  # which says what is wrong
    lengths = sentence_lengths(mask) if mask.dim() == 2 else None
    groups = plan_groups(lengths, mask.shape[1]) if lengths else None
    if groups is None:
        return run(*flat_inputs)
    together: list[Tensor] = []
    for rows, columns in groups:
        chosen = torch.tensor(rows)
        short = (whole[chosen, :columns].contiguous() for whole in inputs)
        parts = [part for part in run(*short) if isinstance(part, Tensor)]
        together = together or [part.new_empty((len(mask), *part.shape[1:])) for part in parts]
        for whole, part in zip(together, parts, strict=True):
            whole[chosen] = part
    return tuple(together)


def sentence_lengths(mask: Tensor) -> list[int] | None:
    """Tokens per sentence of a mask [B, S]; None if nothing is padded, or not only behind the ends, or all of one."""
    visible = mask != 0
    if bool(visible.all()):
        return None
    lengths = visible.sum(1)
    ends = torch.arange(mask.shape[1]) < lengths[:, None]
    if not torch.equal(visible, ends) or int(lengths.min()) == 0:
        return None
    return [int(length) for length in lengths]


def plan_groups(lengths: Sequence[int], columns: int) -> list[Group] | None:
    """The cheapest cut of a batch into groups (rows, columns), or None if the whole batch is about as cheap.

    lengths: of the sentences, padded to `columns`. A group costs its rows times its columns, and `CALL_TOKENS`.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    widths = [min(columns, -(-lengths[row] // STEP) * STEP) for row in order]
    # best[n]: the cheapest way to run the n shortest sentences, and where its last group begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(order) + 1):
        ways = (
            (best[start][0] + (end - start) * widths[end - 1] + CALL_TOKENS, start)
            for start in range(end)
            if start == 0 or widths[start - 1] != widths[start]
        )
        best.append(min(ways))
    if best[-1][0] > WORTH * (len(lengths) * columns + CALL_TOKENS):
        return None
    groups: list[Group] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append((tuple(order[start:end]), widths[end - 1]))
        end = start
    return groups
