"""Stored weights that stand for themselves with few of their rows, while a capture is checked.

What a check asks is whether two ways of computing agree at some sizes, and they have to agree for any weights. So a
stored weight of many rows is replaced on both sides by one that repeats its first rows: only those are decoded, and a
linear multiplies by those and repeats its columns. A check of a model of 270 million weights would otherwise decode
all of them four times, and hold a whole output head in float32 at a time.

Whoever finds a difference here looks again with the true weights: a call that this mode does not see on one side only
(inside of a function that torch overrides as a whole) makes the sides differ though the graph is right.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torchweld.graph.ops.dequantize import dequantize
from torchweld.graph.stand_ins import StandIns

ROWS: Final = 61
"""A prime that no head size, group or block is a multiple of: a cut at a wrong place shows."""


class FewRows(StandIns[Tensor]):
    """While active, `torchweld::dequantize` of a matrix gives the weight whose row i is row i % ROWS of it.

    Products with such a weight by `linear` cost ROWS columns; whatever else reads it gets all of it.
    """

    def is_large(self, rows: int, columns: int) -> bool:
        """A weight with more rows than that."""
        return rows > ROWS

    def hold(self, data: Tensor, format_: str, columns: int) -> Tensor:
        """The first rows."""
        first: Tensor = dequantize(data[:ROWS], format_, columns)
        return first

    def product(self, x: Tensor, held: Tensor, rows: int) -> Tensor:
        """[..., K] -> [..., rows], where rows of the weight repeat."""
        return F.linear(x, held).index_select(-1, self._numbers(held, rows))

    def whole(self, held: Tensor, rows: int) -> Tensor:
        """The weight, float32 [rows, K]."""
        return held.index_select(0, self._numbers(held, rows))

    @staticmethod
    def _numbers(held: Tensor, rows: int) -> Tensor:
        """The row that stands for each row of a weight: int64 [rows]."""
        return torch.arange(rows, device=held.device) % ROWS
