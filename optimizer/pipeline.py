"""The way of a program through the passes, as one readable tuple, with everything that is measured on the way.

    capture -> canonicalize -> recognize -> fuse -> plan -> executable

Timing, skipping, fuel and verification live here and nowhere else; a pass only finds, checks and rewrites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, overload

import torch
from torch import fx

from torchweld import passes
from torchweld.codegen.lower import Lowerer
from torchweld.graph.cost import pricing
from torchweld.graph.fusion import FusionOutcome, FusionPass, Measure, run_fusion
from torchweld.graph.groups import GroupGraph
from torchweld.graph.partition import fused_module
from torchweld.graph.program import Program, source_line
from torchweld.graph.rewrite import Pass, PassOutcome, Refusal, run_pass
from torchweld.graph.target import Target
from torchweld.optimizer.ledger import Ledger, MaskRecord, PassRecord, Phase, RefusalRecord

AnyPass = Pass[Any] | FusionPass

MAX_REFUSALS_KEPT = 200

AfterPass = Callable[[str, fx.GraphModule], None]
"""Called with a pass's name and the runnable graph after every pass that changed something."""


def pipeline() -> tuple[AnyPass, ...]:
    """Every pass in order; the reasons for the order stand beside each in `passes/order.py`."""
    return (*passes.CANONICALIZE, *passes.RECOGNIZE, *passes.FUSE)


class PassNames(Sequence[str]):
    """The names of all passes in pipeline order, each once; they are imported when somebody looks at a name."""

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(pass_.NAME) for pass_ in pipeline()))

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        """One name, or some."""
        return self._names[at]

    def __len__(self) -> int:
        """How many passes there are."""
        return len(self._names)


_NAMES: Final = PassNames()


def pass_names() -> Sequence[str]:
    """The names of all passes in pipeline order, each once."""
    return _NAMES


@dataclass
class Settings:
    """What a run of the pipeline needs to know; `fuel` counts rewrites over all passes and is used up."""

    target: Target
    hints: Mapping[str, int]
    skip: frozenset[str] = frozenset()
    fuel: int | None = None
    measure: Measure | None = None
    after_pass: AfterPass | None = None
    ledger: Ledger = field(default_factory=Ledger)
    lossy: tuple[Pass[Any], ...] = ()

    def wants(self, pass_: AnyPass) -> bool:
        """Whether a pass is to run."""
        return pass_.NAME not in self.skip and self.fuel != 0

    def burn(self, applied: int) -> None:
        """Use up fuel."""
        if self.fuel is not None:
            self.fuel = max(0, self.fuel - applied)


def run_graph_passes(program: Program, settings: Settings) -> Program:
    """A copy of `program` with the graph passes applied; records go to the ledger."""
    program = program.copied()
    for pass_ in (*passes.CANONICALIZE, *passes.RECOGNIZE, *settings.lossy):
        if not settings.wants(pass_):
            continue
        start = time.perf_counter()
        outcome = run_pass(program.graph_module, pass_, settings.fuel)
        settings.burn(outcome.applied)
        _record(settings.ledger, pass_, outcome, start)
        if settings.after_pass is not None and outcome.applied:
            settings.after_pass(str(pass_.NAME), program.graph_module)
    settings.ledger.masks.extend(_masks(program.graph_module))
    return program


def _masks(graph_module: fx.GraphModule) -> list[MaskRecord]:
    """One record per kind of mask and proof, in graph order."""
    records: dict[tuple[str, str], MaskRecord] = {}
    for node in graph_module.graph.nodes:
        if "mask_name" not in node.meta:
            continue
        key = str(node.meta["mask_name"]), str(node.meta["mask_proof"])
        known = records.get(key, MaskRecord(*key, f"{node.name} ({source_line(node)})", 0))
        records[key] = replace(known, count=known.count + 1)
    return list(records.values())


def fuse(program: Program, settings: Settings) -> GroupGraph:
    """The group graph of a program after the four fusions."""
    lowerer = Lowerer(settings.target.cores)
    groups = GroupGraph.of(
        program.graph_module, lowerer, pricing(settings.target, settings.hints), settings.hints
    )
    for pass_ in passes.FUSE:
        if not settings.wants(pass_):
            continue
        start = time.perf_counter()
        outcome = run_fusion(groups, pass_, fuel=settings.fuel, measure=settings.measure)
        settings.burn(outcome.applied)
        _record_fusion(settings.ledger, pass_, outcome, start, settings.measure is not None)
        if settings.after_pass is not None and outcome.applied:
            settings.after_pass(str(pass_.NAME), fused_module(groups, group_names(groups)))
    return groups


def group_names(groups: GroupGraph) -> dict[int, str]:
    """A name per group for the runnable fused graph: its kernel's, or `eager`."""
    names = {}
    for group in groups.groups.values():
        lowered = groups.lowered.get(group.id)
        kernel = getattr(lowered, "kernel", None)
        names[group.id] = "eager" if kernel is None else str(kernel.name)
    return names


def size_hints(program: Program, example_inputs: tuple[torch.Tensor, ...] | None) -> dict[str, int]:
    """A value for every size symbol of the inputs: the example's, else 1 for the first dimension and 64 for others."""
    hints: dict[str, int] = {}
    tensors = iter(example_inputs or ())
    for node in program.placeholders:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        example = next(tensors, None)
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                given = example.shape[dim] if example is not None else (1 if dim == 0 else 64)
                hints.setdefault(str(size.node.expr), max(1, given))
    return hints


def _record(ledger: Ledger, pass_: AnyPass, outcome: PassOutcome, start: float) -> None:
    refused = tuple(_refusal(refusal) for refusal in outcome.refused[:MAX_REFUSALS_KEPT])
    milliseconds = (time.perf_counter() - start) * 1e3
    ledger.passes.append(
        PassRecord(
            outcome.name, str(pass_.EXACTNESS), outcome.matched, refused, outcome.applied, True, milliseconds
        )
    )


def _record_fusion(
    ledger: Ledger, pass_: AnyPass, outcome: FusionOutcome, start: float, is_measured: bool
) -> None:
    refused = tuple(_refusal(refusal, times) for refusal, times in outcome.refused)
    milliseconds = (time.perf_counter() - start) * 1e3
    ledger.passes.append(
        PassRecord(
            outcome.name,
            str(pass_.EXACTNESS),
            outcome.matched,
            refused,
            outcome.applied,
            True,
            milliseconds,
            modelled_saving_us=0.0 if is_measured else outcome.saved,
            measured_saving_us=outcome.saved if is_measured else None,
        )
    )


def _refusal(refusal: Refusal, count: int = 1) -> RefusalRecord:
    where = "" if refusal.node is None else f"{refusal.node.name} ({source_line(refusal.node)})"
    return RefusalRecord(refusal.reason, where, count)


class timed:
    """`with timed(ledger, "fuse"):` records the seconds of a phase."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger, self._name = ledger, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._ledger.phases.append(Phase(self._name, time.perf_counter() - self._start))
