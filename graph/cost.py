"""The roofline that fusion is guided by.

    t = launch + max(t_memory, t_arithmetic) + 0.05 * min(t_memory, t_arithmetic)

Bytes are counted once per distinct buffer, arithmetic that is computed again is counted again.  The ceilings are the
target's measured ones.  The smooth maximum: XLA's GPU performance model, with 0.05 for what does not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torchweld.graph.groups import Work
from torchweld.graph.index import evaluate
from torchweld.graph.target import Target

OVERLAP_LOSS = 0.05


def roofline_microseconds(nbytes: float, flops: float, target: Target, dtype_bits: int = 32) -> float:
    """Modelled time of one kernel in microseconds; `nbytes` moved, `flops` operations of the given width."""
    peak = target.f32_gflops if dtype_bits >= 32 else target.bf16_gflops
    memory = nbytes / (target.read_gb_s * 1e3)
    arithmetic = flops / (peak * 1e3)
    return target.launch_us + max(memory, arithmetic) + OVERLAP_LOSS * min(memory, arithmetic)


def pricing(target: Target, hints: Mapping[str, int]) -> Callable[[Work], float]:
    """A price for a group's work at the hinted sizes; remembered per work, since layers repeat."""
    known: dict[int, tuple[Work, float]] = {}

    def price(work: Work) -> float:
        if id(work) not in known:
            nbytes = evaluate(work.reads, hints) + evaluate(work.writes, hints)
            known[id(work)] = (work, roofline_microseconds(nbytes, evaluate(work.flops, hints), target))
        return known[id(work)][1]

    return price
