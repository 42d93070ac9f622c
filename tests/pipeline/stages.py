"""One random program through every stage of the compiler, each stage judged against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from tests.generators.graphs import GeneratedCase
from torchweld.codegen.build_plan import BuiltPlan, build_plan
from torchweld.codegen.interpreter import interpret
from torchweld.codegen.ir import Kernel
from torchweld.codegen.plan import EagerStep, Launch, Plan
from torchweld.codegen.plan_inputs import bind_sizes
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

#: A machine on which nearly every fusion pays: launches are dear, memory is slow.
TARGET = Target(
    name="test", read_gbps=10.0, f32_gflops=100.0, bf16_gflops=100.0, int8_gops=100.0, launch_us=20.0, cores=2,
    l2_bytes=1 << 20,
)  # fmt: skip


class StageFailure(AssertionError):
    """A stage whose outputs are not those of the program; the message holds the program."""


@dataclass(frozen=True)
class Compiled:
    """What the passes made of a case."""

    program: Program
    groups: GroupGraph
    built: BuiltPlan
    ledger: Ledger


class Judge:
    """Judges the outputs of stages of one case; the yardstick is measured once."""

    def __init__(self, program: Program, inputs: Sequence[object], label: str, code: Callable[[], str]) -> None:
        self.inputs, self.label, self.code = tuple(inputs), label, code
        module = program.graph_module
        self.reference = reference_float64(module, self.inputs)
        with torch.no_grad():
            self.eager = tuple(module(*self.inputs))
        self.dtype = compute_dtype(program)
        self.spread = rounding_spread(module, self.inputs, self.dtype) if False else None
        self.moves = is_data_movement(module)

    def stage(self, name: str, run: Callable[..., Sequence[object]]) -> tuple[object, ...]:
        """Run a stage; StageFailure unless its outputs are right and its inputs what they were."""
        before = snapshot(self.inputs)
        try:
            with torch.no_grad():
                outputs = tuple(run(*self.inputs))
        except Exception as error:
            raise StageFailure(f"{self.label}: {name} raises {type(error).__name__}: {error}\n{self.code()}") from error
        verdict = compare(
            outputs, self.reference, dtype_of_compute=self.dtype, eager=self.eager, data_movement=self.moves,
            exceptions=EXCEPTIONS,
        )  # fmt: skip
        reasons = [*verdict.reasons, *(f"input {n} was changed" for n in changed_inputs(before, self.inputs))]
        if reasons:
            raise StageFailure(f"{self.label}: {name}: {'; '.join(reasons)}\n{self.code()}")
        return outputs


def program_of(module: fx.GraphModule, inputs: Sequence[object], outputs: int) -> Program:
    """A module in captured form (with fake values on its nodes) as a program."""
    in_spec = pytree.tree_structure((tuple(inputs), {}))
    return Program(module, in_spec, pytree.tree_structure(tuple(range(outputs))), "random")


def compile_stages(program: Program, judge: Judge) -> Compiled:
    """All passes and the plan; every stage is judged but the kernels."""
    ledger = Ledger()

    def after_pass(name: str, module: fx.GraphModule) -> None:
        judge.stage(name, lambda *flat: tuple(module(*flat)))

    tensors = tuple(value for value in judge.inputs if isinstance(value, Tensor))
    settings = Settings(TARGET, size_hints(program, tensors), after_pass=None, ledger=ledger)
    program = run_graph_passes(program, settings)
    judge.stage("graph passes", lambda *flat: tuple(program.graph_module(*flat)))
    groups = fuse(program, settings)
    fused = fused_module(groups, group_names(groups))
    judge.stage("fusion", lambda *flat: tuple(fused(*flat)))
    return Compiled(program, groups, build_plan(groups), ledger)
