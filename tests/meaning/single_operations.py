"""Programs of few operations, each a kernel of its own in the reference interpreter: no pass, no fusion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tests.pipeline.stages import TARGET, Judge, run_interpreted
from torchweld.codegen.build_plan import build_plan
from torchweld.codegen.lower import Lowerer
from torchweld.graph.cost import pricing
from torchweld.graph.groups import GroupGraph
from torchweld.graph.program import Program


def run_unfused(program: Program, inputs: Sequence[Tensor], label: str) -> list[str]:
    """Judge the kernels of `program` against eager torch and float64; return why operations had no kernel."""
    judge = Judge(program, inputs, label, lambda: str(program.graph))
    groups = GroupGraph.of(program.graph_module, Lowerer(TARGET.cores), pricing(TARGET, {}), {})
    built = build_plan(groups)
    judge.stage("interpreter", lambda *flat: run_interpreted(built, flat))
    return [group.eager for group in groups.groups.values() if group.eager is not None]
