"""`torchweld dump`: one readable, self-checking file per fused kernel, built for every target."""

from __future__ import annotations

from torchweld.graph.target import GPU_TARGETS
from torchweld.optimizer.suggest import check_name

TARGETS = (*(target.name for target in GPU_TARGETS), "cpu")


def parse_targets(text: str) -> tuple[str, ...]:
    """`sm_90,cpu` as names, each once; UnknownNameError for one that does not exist or if there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()] or [text]
    return tuple(dict.fromkeys(check_name("target", name, TARGETS, "--target") for name in names))
