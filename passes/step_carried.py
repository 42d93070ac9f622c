"""What is common to the states of convolutions, running values and scans: rows in caches [B, 1, C, features].

describe(found, node) -> (CarriedState, ...)        one per cache of a node of `found.carried`
CarriedScope                                        what the writers of their steps work on
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import sympy
import torch
from torch import fx

from torchweld.graph.match import aten, tensor_of
from torchweld.passes.step_copy import StepCopier
from torchweld.passes.step_inputs import StepInputs

APPEND: Final = torch.ops.torchweld.append_rows.default
LAST: Final = 2
"""The window of a state of which only the last row is read: that row, and the row that is computed."""


@dataclass(frozen=True)
class CarriedState:
    """Rows that a convolution, a running value or a scan keeps: [B, 1, C, features] of `dtype`, the last `window`.

    window counts the row that is computed, as that of an attention does.  reach: in words, what is read.
    """

    kind: str
    window: int
    features: int
    dtype: torch.dtype
    reach: str


@dataclass
class CarriedScope:
    """Where the steps of carried nodes are written; `appended` takes their caches with the new rows, by node."""

    rows: StepCopier
    inputs: StepInputs
    caches: dict[fx.Node, tuple[fx.Node, ...]]
    appended: dict[Any, tuple[fx.Node, ...]]

    def append(self, node: fx.Node, new: list[fx.Node]) -> None:
        """Append rows [B, 1, T, F] to the caches of a node."""
        self.appended[node] = tuple(
            self.rows.make(APPEND, cache, part, self.inputs.past, like=node)
            for cache, part in zip(self.caches[node], new, strict=True)
        )

    def cast(self, node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`value` as `dtype`."""
        if tensor_of(value).dtype == dtype:
            return value
        return self.rows.make(aten._to_copy.default, value, like=node, dtype=dtype)


def count_features(sizes: Any, batch: Any) -> int:
    """The product of sizes in a batch of one."""
    return prod(int(sympy.sympify(size).subs(batch, 1)) for size in sizes)


def name_of(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")
