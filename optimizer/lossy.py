"""Change a model on purpose, and say by how much: passes that are not exact, each with its measured error.

    changed = change(program, ReplaceWindow(256), (ids,))
    changed.comparison.kl_mean, changed.max_abs          # what it costs on these ids
    model = CachedModel(changed.program)

`Options(lossy=...)` runs the same passes inside a compilation, where the ledger lists them as lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchweld.graph.logits import LogitComparison, compare_logits
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Pass, PassOutcome, run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE


@dataclass(frozen=True)
class Changed:
    """A changed program, what the pass did, and how far the logits moved on the given inputs.

    max_abs: largest absolute difference of a logit. comparison: KL(before || after) of the next-token distributions.
    """

    program: Program
    outcome: PassOutcome
    max_abs: float
    comparison: LogitComparison

    def describe(self) -> str:
        """`replace_window: 4 of 4 changed; max abs 1.2e-01, KL mean 3.4e-03, max 2.0e-02, top 1 equal 98.2 %`."""
        found = self.comparison
        return (
            f"{self.outcome.name}: {self.outcome.applied} of {self.outcome.matched} changed; "
            f"max abs {self.max_abs:.1e}, KL mean {found.kl_mean:.1e}, max {found.kl_max:.1e}, "
            f"top 1 equal {100 * found.top1_agreement:.1f} %"
        )


def change(program: Program, pass_: Pass[Any], inputs: Sequence[object]) -> Changed:
    """Apply a lossy pass to a copy of a captured language model, and measure it on flat `inputs`.

    The first output that is a tensor holds the logits [..., V]. The program itself stays as it is.
    """
    changed = program.copied()
    for exact in (*CANONICALIZE, *RECOGNIZE):
        run_pass(changed.graph_module, exact)
    outcome = run_pass(changed.graph_module, pass_)
    before, after = (_logits(one, inputs) for one in (program, changed))
    return Changed(
        changed, outcome, (after.double() - before.double()).abs().max().item(), compare_logits(after, before)
    )


def _logits(program: Program, inputs: Sequence[object]) -> Tensor:
    with torch.no_grad():
        outputs = program.graph_module(*inputs)
    return next(value for value in outputs if isinstance(value, Tensor))
