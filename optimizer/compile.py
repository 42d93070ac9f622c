"""From a captured program to something that runs: passes, fusion, plan, executable, and the report about it all."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from torchweld.codegen.build_plan import BuiltPlan, PlanRefused, build_plan
from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp_packed import PRECISIONS, Precision
from torchweld.codegen.executable import BuildError, Executable
from torchweld.codegen.ir import AttentionPart, MatmulPart, Part
from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.plan import EagerStep, Launch, Plan
from torchweld.codegen.probe import measured_target
from torchweld.codegen.work import moved_and_minimum
from torchweld.graph.cost import roofline_microseconds
from torchweld.graph.fusion import Measure
from torchweld.graph.groups import Group, GroupGraph
from torchweld.graph.index import evaluate
from torchweld.graph.match import rank_of
from torchweld.graph.padding import Padding, check_padding
from torchweld.graph.program import Program, source_line
from torchweld.graph.rewrite import Pass, Refusal
from torchweld.graph.target import Target
from torchweld.optimizer.environment import apply_logs, read_environment
from torchweld.optimizer.ledger import Fallback, LaunchRecord, Ledger
from torchweld.optimizer.pipeline import (
    AfterPass,
    Settings,
    fuse,
    pass_names,
    run_graph_passes,
    size_hints,
    timed,
)
from torchweld.optimizer.report import Report
from torchweld.optimizer.skip_padding import run_without_padding
from torchweld.optimizer.stages import StageWriter

log = logging.getLogger(__name__)
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Options:
    """How to compile.

    threads: of the CPU executable; None means torch's.  guide: "model" decides fusions by the cost model, "measure" by
    timing the candidates.  skip: pass names to leave out (the environment's are added).  fuel: at most this many
    rewrites.  strict: raise BuildError instead of running eagerly where the graph cannot be compiled.
    target: ceilings to use instead of this machine's measured ones.  warm: use plans of earlier runs from the cache.
    precision: of products with stored weights; "f32" is exact up to rounding in float32.  "bf16": activations and
    weights are rounded to bfloat16 where more than 16 rows meet a weight (each product off by at most 2^-7 of itself).
    "int8": as "bf16", and activations of up to 16 rows in int8 with a scale for every 32 (each off by at most 1/254 of
    the greatest of its 32).
    tune: when products of more than 64 rows are measured against ATen, which runs them where it is faster
    (optimizer/choose_library.py): "example", at optimize() for the sizes of its inputs; "calls", also at the first call
    with sizes twice as large or half; "never". A row's bits may then differ between calls of more than 64 rows. Not
    for steps of decoding.
    lossy: passes that change the model, behind the exact ones; optimizer/lossy.py measures what they cost.
    packed_cache: keep packed weights on disk in the cache, about as large as the model, and look for them there.
    Not a gain by itself: Gemma with 2 threads, 0.80 s to find and check all, 0.83 s to pack it.
    """

    threads: int | None = None
    guide: str = "model"
    skip: frozenset[str] = frozenset()
    fuel: int | None = None
    strict: bool = False
    target: Target | None = None
    cache: Cache | None = None
    after_pass: AfterPass | None = None
    warm: bool = True
    precision: Precision = "f32"
    lossy: tuple[Pass[Any], ...] = ()
    tune: Literal["example", "calls", "never"] = "example"
    packed_cache: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if self.guide not in ("model", "measure"):
            raise ValueError(f"guide={self.guide!r}: expected 'model' or 'measure'")
        if self.tune not in ("example", "calls", "never"):
            raise ValueError(f"tune={self.tune!r}: expected 'example', 'calls' or 'never'")


@dataclass
class Compiled:
    """A compiled program.  `executable` is None where it runs eagerly; `eager_reason` then says why.

    After a warm start (optimizer/warm.py) there is no group graph, and `program` is a signature without its graph.
    """

    program: Program
    groups: GroupGraph | None
    built: BuiltPlan | None
    executable: Executable | None
    report: Report
    hints: Mapping[str, int]
    eager_reason: str | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def fused(self) -> GroupGraph:
        """The group graph; RuntimeError after a warm start."""
        if self.groups is None:
            raise RuntimeError(
                f"{self.program.name} came from the cache, without its groups: use Options(warm=False)"
            )
        return self.groups

    def __call__(self, *flat_inputs: object) -> tuple[object, ...]:
        """Run on flat inputs (one per placeholder) and give the flat results; no autograd."""
        if self.executable is None or self.built is None:
            with torch.no_grad():
                result = self.program.graph_module(*flat_inputs)
            return tuple(result)
        if self.report.padding is not None:
            return run_without_padding(self._run, flat_inputs, self.report.padding)
        return self._run(*flat_inputs)

    def _run(self, *flat_inputs: object) -> tuple[object, ...]:
        """One call of the executable."""
        assert self.executable is not None and self.built is not None
        tensors = [flat_inputs[position] for position in self.built.tensor_inputs]
        values = self.executable(*tensors)  # type: ignore[arg-type]
        return tuple(constant if at is None else values[at] for at, constant in self.built.results)

    def prepare(self, *flat_inputs: object) -> Callable[[], tuple[object, ...]] | None:
        """The call with these inputs, of which only the values will change (codegen/prepared_call.py), for calling it
        often; None where there is no gain."""
        if self.executable is None or self.built is None or self.report.padding is not None:
            return None
        tensors = [flat_inputs[position] for position in self.built.tensor_inputs]
        call = self.executable.prepare(*tensors)  # type: ignore[arg-type]
        order = [at for at, _ in self.built.results if at is not None]
        if call is None or len(order) < len(self.built.results):
            return None
        if order == list(range(len(call.results))):
            return call
        return lambda: tuple(map(call().__getitem__, order))

    def run(self, *args: object, **kwargs: object) -> object:
        """Run with the source model's signature."""
        flat = self.program.flatten_inputs(args, kwargs)
        return self.program.unflatten_outputs(self(*flat))


def compile_program(
    program: Program, *, options: Options = Options(), example_inputs: Sequence[Tensor] | None = None,
    name: str | None = None, measure: Measure | None = None,
) -> Compiled:  # fmt: skip
    """Compile a captured program for this machine's CPU.

    example_inputs: flat tensors at whose sizes costs are modelled (default: batch 1, other sizes 64).  Where a plan or
    a compiler is missing, the program runs eagerly, says so once, and `Compiled.eager_reason` keeps the reason.
    """
    environment = read_environment(pass_names())
    apply_logs(environment.logs)
    cache = options.cache or Cache()
    ledger = Ledger()
    with timed(ledger, "ceilings"):
        target = options.target or measured_target(cache)
    hints = size_hints(program, tuple(example_inputs) if example_inputs else None)
    fuel = options.fuel if options.fuel is not None else environment.fuel
    stages = None if environment.dump is None else StageWriter(environment.dump)
    after_pass = _both(stages, options.after_pass)
    skip = options.skip | environment.skip
    settings = Settings(target, hints, skip, fuel, measure, after_pass, ledger, options.lossy)
    with timed(ledger, "passes"):
        program = run_graph_passes(program, settings)
    with timed(ledger, "fusion"):
        groups = fuse(program, settings)
    built, executable, reason = _build(groups, options, cache, ledger)
    if reason is not None and options.strict:
        raise BuildError(reason)
    if stages is not None and executable is not None:
        stages.write_unit(executable.source)
    compiled = Compiled(program, groups, built, executable, Report("", target), hints, reason, ledger)
    compiled.report = make_report(compiled, name or program.name, target)
    return compiled


def _both(first: AfterPass | None, second: AfterPass | None) -> AfterPass | None:
    """One callback that serves two listeners."""
    if first is None or second is None:
        return first or second

    def call(name: str, module: fx.GraphModule) -> None:
        first(name, module)
        second(name, module)

    return call


def make_executable(plan: Plan, options: Options, cache: Cache) -> Executable:
    """The executable of a plan as the options wish it. Raises BuildError."""
    return Executable(
        plan,
        threads=options.threads,
        cache=cache,
        precision=options.precision,
        packed_cache=options.packed_cache,
    )


def _build(
    groups: GroupGraph, options: Options, cache: Cache, ledger: Ledger
) -> tuple[BuiltPlan | None, Executable | None, str | None]:
    """Plan and executable, or why there is none."""
    built = None
    try:
        with timed(ledger, "plan"):
            built = build_plan(groups)
        with timed(ledger, "build"):
            return built, make_executable(built.plan, options, cache), None
    except (PlanRefused, BuildError) as problem:
        warnings.warn(f"torchweld runs this model eagerly: {problem}", stacklevel=4)
        return built, None, str(problem)


def make_report(compiled: Compiled, name: str, target: Target) -> Report:
    """The report of a compilation at the hinted sizes."""
    launches, fallbacks = [], []
    if compiled.built is not None:
        layers = group_layers(compiled.fused)
        for step, number in zip(compiled.built.plan.steps, compiled.built.step_groups, strict=True):
            if isinstance(step, Launch) and number is not None:
                launches.append(_launch_record(compiled, step, number, layers[number], target))
            elif isinstance(step, EagerStep) and number is not None:
                fallbacks.append(_fallback(compiled.fused.groups[number], step, layers[number]))
    if compiled.eager_reason is not None:
        fallbacks = [Fallback("the whole program", compiled.eager_reason)]
    padding = check_padding(compiled.program)
    return Report(
        model=name, target=target, sizes=tuple(sorted(compiled.hints.items())), passes=tuple(compiled.ledger.passes),
        masks=tuple(compiled.ledger.masks),
        launches=tuple(launches), fallbacks=tuple(fallbacks), phases=tuple(compiled.ledger.phases),
        padding=padding if isinstance(padding, Padding) else None,
        padding_kept=_padding_sentence(padding),
    )  # fmt: skip


def _padding_sentence(found: Padding | Refusal) -> str:
    """Why padding is computed, of a program that has a mask of it."""
    if isinstance(found, Padding) or found.node is None:
        return ""
    return f"{found.reason}: {found.node.name} {source_line(found.node)}".strip()


def _launch_record(
    compiled: Compiled, step: Launch, number: int, layer: int | None, target: Target
) -> LaunchRecord:
    lowered = compiled.fused.lowered[number]
    assert isinstance(lowered, LoweredGroup)
    moved, minimum = moved_and_minimum(step.kernel, compiled.hints, target.l2_bytes)
    flops = evaluate(lowered.work.flops, compiled.hints)
    return LaunchRecord(
        step.kernel.name, tuple(_part_kind(part) for part in step.kernel.parts), layer, moved, minimum, flops,
        roofline_microseconds(moved, flops, target), None, step.kernel.ops, step.kernel.sources,
    )  # fmt: skip


def _part_kind(part: Part) -> str:
    if isinstance(part, MatmulPart):
        return "matmul"
    return "attention" if isinstance(part, AttentionPart) else "row"


def _fallback(group: Group, step: EagerStep, layer: int | None) -> Fallback:
    node = group.nodes[0]
    return Fallback(f"{node.name} ({node.target})", step.reason, source_line(node), layer)


def layer_number(weight: fx.Node) -> int | None:
    """The first number in a weight's dotted name: `layers.3.attn.q_proj.weight` is in layer 3."""
    match = LAYER.search(str(weight.target))
    return int(match.group(1)) if match else None


def group_layers(groups: GroupGraph) -> dict[int, int | None]:
    """The layer of every group: that of its matrices; else of the first weight; else the latest of what it reads.

    A kernel that reaches over the end of a layer (the last norm of one, and the projections of the next) belongs to the
    layer whose matrices it reads; one without matrices to the layer in which it begins.
    """
    layers: dict[int, int | None] = {}
    for group in groups.topological():
        weights = [node for node in group.inputs if node.op == "get_attr"]
        if weights:
            matrices = [node for node in weights if rank_of(node) > 1]
            inside = [node for node in matrices if layer_number(node) is not None]
            layers[group.id] = layer_number([*inside, *matrices, *weights][0])
            continue
        before = [layers[parent] for parent in groups.dag.predecessors(group.id)]
        layers[group.id] = max((n for n in before if n is not None), default=None)
    return layers


def with_error(report: Report, max_relative_error: float) -> Report:
    """The report with the measured error against float64."""
    return replace(report, max_relative_error=max_relative_error)
