"""Warm starts of step programs: the compiled step of a causal model, from the cache, without capture and derivation.

Beside the plan (`optimizer/warm.py`) an entry holds what the derivation found out: the state of every layer, the
limits, how the program is called.  Steps for rows and for trees are entries of their own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch.utils._pytree as pytree
from torch import nn

from torchweld.codegen.record_json import NotStorable
from torchweld.graph.program import Program
from torchweld.optimizer.compile import Compiled, Options
from torchweld.optimizer.warm import StepFacts, WarmStart, find_warm_start, nesting
from torchweld.passes.step_program import StepProgram

log = logging.getLogger(__name__)

KEPT: Final = ("states", "limit", "vocabulary", "token_limit", "is_tree", "chooses")
"""Fields of a StepProgram that an entry holds; a step that has more to say is not stored."""


@dataclass(frozen=True)
class StepStart:
    """Where the compiled step of one model is kept."""

    warm: WarmStart

    @property
    def looked_at(self) -> frozenset[str]:
        """Names of the weights that decided something, so far."""
        return frozenset(self.warm.reads.names)

    @contextmanager
    def reads(self, before: Collection[str] = ()) -> Iterator[None]:
        """To be active while a step that is to be stored is derived and compiled.

        before: what was looked at where a part of that was done earlier.
        """
        self.warm.reads.names |= set(before)
        with self.warm.reads:
            yield

    def restore(self) -> tuple[StepProgram, Compiled] | None:
        """The step and what was compiled from it; None as for `WarmStart.restore`."""
        found = self.warm.load()
        if found is None or found.step is None:
            return None
        facts = found.step
        problem = _contradiction(facts, found.compiled)
        if problem is not None:
            log.info("no warm start of the step of %s: %s", facts.name, problem)
            return None
        step = StepProgram(found.compiled.program, **{name: getattr(facts, name) for name in KEPT})
        return step, found.compiled

    def store(self, step: StepProgram, compiled: Compiled) -> bool:
        """Keep a step that was derived and compiled while `reads` was active; whether that was possible."""
        try:
            facts = step_facts(step)
        except NotStorable as problem:
            log.info("%s will start cold again: %s", step.program.name, problem)
            return False
        return self.warm.store(compiled, facts)


def step_facts(step: StepProgram) -> StepFacts:
    """What of a step is stored beside its plan. Raises NotStorable for one that has more parts than an entry knows."""
    for field in dataclasses.fields(step):
        if field.name not in ("program", *KEPT) and getattr(step, field.name) != field.default:
            raise NotStorable(f"its step has {field.name}")
    program = step.program
    return StepFacts(
        **{name: getattr(step, name) for name in KEPT},
        name=program.name,
        parameters=program.parameters,
        inputs=_inputs(program),
    )


def _contradiction(facts: StepFacts, compiled: Compiled) -> str | None:
    """What of the facts the plan does not bear out: its inputs, the states among them, the vocabulary."""
    assert compiled.built is not None
    plan = compiled.built.plan
    options = {"chosen": facts.chooses, "path": facts.is_tree}
    front = ("ids", "past", "positions", "rows", *(name for name, given in options.items() if given))
    if tuple(spec.name for spec in plan.inputs[: len(front)]) != front:
        return f"the inputs of the plan do not begin with {', '.join(front)}"
    caches = [(state.heads, features, state.dtype) for state in facts.states for features in state.features]
    if [(*spec.shape[1::2], spec.dtype) for spec in plan.inputs[len(front) :]] != caches:
        return f"{len(facts.states)} states do not fit the inputs of the plan"
    logits = plan.values.get(plan.outputs[0]) if plan.outputs else None
    if logits is None or logits.shape[-1] != facts.vocabulary:
        return f"its logits are not {facts.vocabulary} wide"
    if compiled.program.in_spec.num_leaves != len(plan.inputs):
        return f"a call has {compiled.program.in_spec.num_leaves} inputs, the plan {len(plan.inputs)}"
    return None


def _inputs(program: Program) -> str:
    leaves = [None] * program.in_spec.num_leaves
    args, kwargs = pytree.tree_unflatten(leaves, program.in_spec)
    return json.dumps(nesting((args, kwargs)))


def find_step_start(
    model: nn.Module, args: tuple[object, ...], options: Options, facts: tuple[object, ...]
) -> StepStart | None:
    """Where to look for, and to keep, the compiled step of `model`; None where there can be no warm start.

    args: what the model is captured with.  facts: whatever else its step follows from, as plain values.
    """
    warm = find_warm_start(model, args, {}, options, True, ("step", *facts))
    return None if warm is None else StepStart(warm)
