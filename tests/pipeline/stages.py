"""One random program through every stage of the compiler, each stage judged against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tests.generators.graphs import GeneratedCase, set_fake_values
from torchweld.codegen.build_plan import BuiltPlan, build_plan
from torchweld.codegen.executable import Executable
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import Kernel
from torchweld.codegen.plan import EagerStep, Launch, Plan, ValueSpec
from torchweld.codegen.plan_inputs import bind_sizes
from torchweld.graph.capture import capture
from torchweld.graph.compare import NonFiniteException, changed_inputs, compare, is_data_movement, snapshot
from torchweld.graph.float64 import reference_float64, rounding_spread
from torchweld.graph.groups import GroupGraph
from torchweld.graph.partition import fused_module
from torchweld.graph.program import Program
from torchweld.graph.target import Target
from torchweld.optimizer.ledger import Ledger
from torchweld.optimizer.pipeline import Settings, fuse, group_names, run_graph_passes, size_hints
from torchweld.optimizer.verify import compute_dtype

EXCEPTIONS = frozenset(NonFiniteException)
#: A machine on which nearly every fusion pays: memory is slow and launches are dear.
TARGET = Target("test", 10.0, 100.0, 100.0, 100.0, 20.0, 1 << 20, 0, 2)


RunKernel = Callable[[Kernel, Mapping[str, Tensor], Mapping[str, int]], Mapping[str, Tensor]]


class StageFailure(AssertionError):
    """A stage whose outputs are not those of the program; the message ends with the program's code."""


@dataclass(frozen=True)
class Stages:
    """What the passes made of a program."""

    program: Program
    groups: GroupGraph
    built: BuiltPlan
    ledger: Ledger

    def applied(self) -> dict[str, int]:
        """How often each pass changed something."""
        counts: dict[str, int] = {}
        for record in self.ledger.passes:
            counts[record.name] = counts.get(record.name, 0) + record.applied
        return counts


class Judge:
    """Judges the outputs of stages of one program at fixed inputs."""

    def __init__(
        self, program: Program, inputs: Sequence[object], label: str, code: Callable[[], str]
    ) -> None:
        self.program, self.inputs, self.label, self.code = program.copied(), tuple(inputs), label, code
        module = self.program.graph_module
        self.reference = reference_float64(module, self.inputs)
        with torch.no_grad():
            self.eager = tuple(module(*self.inputs))
        self.dtype = compute_dtype(self.program)
        self.moves_data = is_data_movement(module)

    def stage(self, name: str, run: Callable[..., Sequence[object]]) -> None:
        """Run a stage; StageFailure unless its outputs are right and its inputs are what they were."""
        before = snapshot(self.inputs)
        try:
            with torch.no_grad():
                outputs = tuple(run(*self.inputs))
        except Exception as error:
            raise self.failure(name, f"raises {type(error).__name__}: {error}") from error
        reasons = [f"input {n} was changed" for n in changed_inputs(before, self.inputs)]
        if reasons:
            raise self.failure(name, "; ".join(reasons))
        self.accept(name, outputs)

    def accept(self, name: str, outputs: Sequence[object]) -> None:
        """StageFailure unless `outputs` are right."""
        reasons = self._compare(outputs, None)
        if reasons:
            # Sampling the rounding costs seven runs: only where the eager run alone is too narrow a yardstick.
            spread = rounding_spread(self.program.graph_module, self.inputs, self.dtype)
            reasons = self._compare(outputs, spread)
        if reasons:
            raise self.failure(name, "; ".join(reasons))

    def failure(self, stage: str, problem: str) -> StageFailure:
        """The error that names stage, problem and program."""
        return StageFailure(f"{self.label}\nstage {stage}: {problem}\n\n{self.code()}")

    def _compare(self, outputs: Sequence[object], spread: Sequence[object] | None) -> tuple[str, ...]:
        verdict = compare(
            tuple(outputs), self.reference, dtype_of_compute=self.dtype, eager=self.eager, spread=spread,
            data_movement=self.moves_data, exceptions=EXCEPTIONS,
        )  # fmt: skip
        return verdict.reasons


def program_of(case: GeneratedCase) -> Program:
    """A case with static sizes in captured form."""
    return _program(case.with_fake_values(), case.inputs)


def traced(function: Callable[..., object], inputs: Sequence[Tensor]) -> Program:
    """A function of tensors in captured form, for these very sizes; composite operations are kept."""

    def flat(*tensors: Tensor) -> tuple[object, ...]:
        result = function(*tensors)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    module = make_fx(flat, pre_dispatch=True)(*inputs)
    set_fake_values(module, inputs)
    return _program(module, inputs)


def symbolic_program(case: GeneratedCase) -> Program:
    """A symbolic case, captured with symbolic batch and sequence sizes."""
    return capture(
        case.module, case.inputs, dynamic={spec.name: (0, 1) for spec in case.input_specs}, verify=False
    )


def _program(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Program:
    results = module.graph.output_node().args[0]
    return Program(
        module, pytree.tree_structure((tuple(inputs), {})), pytree.tree_structure(results), "random"
    )


def compile_stages(program: Program, judge: Judge, skip: frozenset[str] = frozenset()) -> Stages:
    """All passes but those in `skip`, and the plan; judged after the graph passes and after fusion."""
    hints = size_hints(program, tuple(value for value in judge.inputs if isinstance(value, Tensor)))
    settings = Settings(TARGET, hints, skip)
    try:
        rewritten = run_graph_passes(program, settings)
        judge.stage("graph passes", rewritten.graph_module)
        groups = fuse(rewritten, settings)
        fused = fused_module(groups, group_names(groups))
        judge.stage("fusion", fused)
        return Stages(rewritten, groups, build_plan(groups), settings.ledger)
    except StageFailure as failure:
        _blame(program, replace(settings, ledger=Ledger()), judge)
        raise failure
    except Exception as error:
        raise judge.failure("compilation", f"raises {type(error).__name__}: {error}") from error


def _blame(program: Program, settings: Settings, judge: Judge) -> None:
    """Judge after every single pass: raises the failure that names the guilty one."""
    settings.after_pass = lambda name, module: judge.stage(name, module)
    fuse(run_graph_passes(program, settings), settings)


def results_of(built: BuiltPlan, outputs: Sequence[object]) -> tuple[object, ...]:
    """The graph's results from the plan's outputs."""
    return tuple(constant if at is None else outputs[at] for at, constant in built.results)


def run_executable(built: BuiltPlan, executable: Executable, flat: Sequence[object]) -> tuple[object, ...]:
    """The results of a compiled plan."""
    tensors = [value for at in built.tensor_inputs if isinstance(value := flat[at], Tensor)]
    return results_of(built, executable(*tensors))


def run_interpreted(built: BuiltPlan, flat: Sequence[object]) -> tuple[object, ...]:
    """The results of a plan whose kernels run in the reference interpreter."""
    return run_plan(built, flat, interpret)


def run_plan(built: BuiltPlan, flat: Sequence[object], run_kernel: RunKernel) -> tuple[object, ...]:
    """The results of a plan whose kernels `run_kernel` runs: (kernel, tensors by name, sizes) -> outputs by name."""
    plan = built.plan
    tensors = [value for at in built.tensor_inputs if isinstance(value := flat[at], Tensor)]
    sizes = bind_sizes(plan, [tuple(tensor.shape) for tensor in tensors])
    values: dict[str, Tensor] = dict(plan.constants)
    values |= dict(zip((spec.name for spec in plan.inputs), tensors, strict=True))
    for step in plan.steps:
        if isinstance(step, EagerStep):
            arguments = [sizes[name] if name in sizes else values[name] for name in step.arguments]
            values |= dict(zip(step.results, step.module(*arguments), strict=True))
            continue
        pairs = list(zip(step.kernel.buffers, step.arguments, strict=True))
        given = {
            buffer.name: values[plan.in_place[name] if buffer.role == "update" else name].contiguous()
            for buffer, name in pairs
            if buffer.role != "output"
        }
        results = run_kernel(step.kernel, given, sizes)
        values |= {name: results[buffer.name] for buffer, name in pairs if buffer.is_written}
    return results_of(built, [values[name] for name in plan.outputs])


def merged(plans: Sequence[Plan]) -> Plan:
    """Several plans without sizes as one, so that all their kernels are compiled in one translation unit.

    Values are told apart by a prefix; the inputs and outputs of the plans follow each other.
    """
    if any(plan.sizes for plan in plans):
        raise ValueError("plans with sizes cannot be merged: equal names would mean different sizes")
    parts = [_prefixed(plan, f"p{number}_") for number, plan in enumerate(plans)]
    return Plan(
        tuple(spec for part in parts for spec in part.inputs),
        {name: tensor for part in parts for name, tensor in part.constants.items()},
        {name: spec for part in parts for name, spec in part.values.items()},
        tuple(step for part in parts for step in part.steps),
        tuple(name for part in parts for name in part.outputs),
        (),
    )


def _prefixed(plan: Plan, prefix: str) -> Plan:
    def spec(old: ValueSpec) -> ValueSpec:
        return replace(old, name=prefix + old.name)

    def names(old: Sequence[str]) -> tuple[str, ...]:
        return tuple(prefix + name for name in old)

    steps = [
        replace(step, arguments=names(step.arguments))
        if isinstance(step, Launch)
        else replace(step, arguments=names(step.arguments), results=names(step.results))
        for step in plan.steps
    ]
    return Plan(
        tuple(map(spec, plan.inputs)),
        {prefix + name: tensor for name, tensor in plan.constants.items()},
        {prefix + name: spec(value) for name, value in plan.values.items()},
        tuple(steps),
        names(plan.outputs),
        (),
    )


def run_compiled(built: Sequence[BuiltPlan], inputs: Sequence[Sequence[object]]) -> list[tuple[object, ...]]:
    """The results of several plans that are compiled as one unit, per plan."""
    plan = merged([one.plan for one in built])
    tensors = [
        value
        for one, flat in zip(built, inputs, strict=True)
        for at in one.tensor_inputs
        if isinstance(value := flat[at], Tensor)
    ]
    outputs = list(Executable(plan, threads=1)(*tensors))
    results = []
    for one in built:
        count = len(one.plan.outputs)
        results.append(results_of(one, outputs[:count]))
        outputs = outputs[count:]
    return results
