"""Warm starts: the plan of a model that was compiled before, from the cache, without capture, passes and fusion.

What is stored under a model's fingerprint is the plan with its kernels, the structure of the outputs and the report;
no weight is.  The plan reads the weights that the model has now, so a fine-tuned model starts as warm as the
original.  Where the passes looked into a weight (a mask, a scalar exponent), the entry holds a digest of it and serves
only models in which it is the same.

There is no warm start where one could be wrong (`graph/fingerprint.py` says when) or where it would lack what is asked
for: comparing, dumping and explaining need the captured program.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from torchweld.codegen.build_plan import BuiltPlan
from torchweld.codegen.cache import Cache, CacheError, make_key
from torchweld.codegen.executable import BuildError
from torchweld.codegen.plan import Plan
from torchweld.codegen.plan_json import SHARED, check_stored_plan, name_tensors
from torchweld.codegen.probe import measured_target
from torchweld.codegen.record_json import DamagedRecord, NotStorable, record_from_json, record_to_json
from torchweld.graph.capture_inputs import positional_names
from torchweld.graph.fingerprint import fingerprint
from torchweld.graph.program import Program
from torchweld.graph.value_reads import ValueReads, digest_values
from torchweld.optimizer.compile import Compiled, Options, make_executable
from torchweld.optimizer.environment import read_environment
from torchweld.optimizer.ledger import Ledger, Phase
from torchweld.optimizer.pipeline import pass_names
from torchweld.optimizer.report import Report
from torchweld.passes.step_program import LayerState

log = logging.getLogger(__name__)

MOST_DIGESTED: Final = 16 << 20
"""Bytes of weights that are digested at a start at most; a plan that depends on more is not stored."""

Plain = bool | int | float | str | None
Structure = str | list["Structure"]


@dataclass(frozen=True)
class StepFacts:
    """What is stored of a step (`optimizer/warm_step.py`): the fields of a StepProgram, and how its program is called.

    inputs: JSON of `nesting` of (args, kwargs).  name, parameters: those of the program.
    """

    states: tuple[LayerState, ...]
    limit: int | None
    vocabulary: int
    token_limit: int | None
    is_tree: bool
    chooses: bool
    name: str
    parameters: tuple[str, ...]
    inputs: str


@dataclass(frozen=True)
class Entry:
    """What is stored: a built plan (see `BuiltPlan`), how outputs are nested, which values decided it, the report.

    outputs: JSON of `nesting`.  looked_at: names of tensors of the model and the digests of their values.
    step: None for a model that is compiled as it is.
    """

    plan: Plan
    step_groups: tuple[int | None, ...]
    results: tuple[tuple[int | None, Plain], ...]
    tensor_inputs: tuple[int, ...]
    outputs: str
    looked_at: tuple[tuple[str, str], ...]
    report: Report
    step: StepFacts | None = None


@dataclass(frozen=True)
class Restored:
    """What an entry became."""

    compiled: Compiled
    step: StepFacts | None


@dataclass(frozen=True)
class WarmStart:
    """Where the plan for one model and one structure of inputs is kept.

    reads: to be active (`with start.reads:`) while a program that is to be stored is compiled.
    """

    key: str
    model: nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    options: Options
    cache: Cache
    tensors: Mapping[str, Tensor]
    reads: ValueReads
    began: float = field(default_factory=time.perf_counter)

    def restore(self) -> Compiled | None:
        """The compiled program; None if it is not there, damaged, made for other values, or cannot be built here."""
        found = self.load()
        return None if found is None else found.compiled

    def load(self) -> Restored | None:
        """As `restore`, with what is known of a step."""
        data = self.cache.get_json(self.key)
        if data is None:
            return None
        try:
            entry = record_from_json(data, Entry, SHARED, self.tensors)
            check_stored_plan(entry.plan)
            self._check_values(entry)
            program = self._signature(entry)
            loaded = time.perf_counter()
            executable = make_executable(entry.plan, self.options, self.cache)
        except (DamagedRecord, BuildError) as problem:
            log.info("no warm start of %s: %s", type(self.model).__name__, problem)
            return None
        phases = (Phase("warm start", loaded - self.began), Phase("build", time.perf_counter() - loaded))
        report = replace(entry.report, phases=phases)
        built = BuiltPlan(entry.plan, entry.step_groups, entry.results, entry.tensor_inputs)
        ledger = Ledger(passes=list(report.passes), phases=list(phases))
        compiled = Compiled(program, None, built, executable, report, dict(report.sizes), None, ledger)
        return Restored(compiled, entry.step)

    def store(self, compiled: Compiled, step: StepFacts | None = None) -> bool:
        """Keep a program that was compiled while `reads` was active; whether that was possible."""
        try:
            data = record_to_json(self._entry(compiled, step), Entry, SHARED, name_tensors(self.tensors))
            self.cache.put_json(self.key, data, {"kind": "plan", "name": type(self.model).__name__})
        except (NotStorable, CacheError) as problem:
            log.info("%s will start cold again: %s", type(self.model).__name__, problem)
            return False
        return True

    def _entry(self, compiled: Compiled, step: StepFacts | None) -> Entry:
        built = compiled.built
        if built is None or compiled.executable is None:
            raise NotStorable("it runs eagerly")
        if sum(self.tensors[name].nbytes for name in self.reads.names) > MOST_DIGESTED:
            raise NotStorable(f"the passes looked into more than {MOST_DIGESTED} bytes of weights")
        looked_at = tuple((name, digest_values(self.tensors[name])) for name in sorted(self.reads.names))
        leaves = [None] * compiled.program.out_spec.num_leaves
        outputs = json.dumps(nesting(pytree.tree_unflatten(leaves, compiled.program.out_spec)))
        # The writer refuses results that are no plain values.
        results: tuple[tuple[int | None, Plain], ...] = built.results  # type: ignore[assignment]
        report = replace(compiled.report, phases=())
        tensor_inputs = built.tensor_inputs
        return Entry(built.plan, built.step_groups, results, tensor_inputs, outputs, looked_at, report, step)

    def _check_values(self, entry: Entry) -> None:
        """Raise DamagedRecord if a value that decided something is another one now."""
        for name, digest in entry.looked_at:
            if name not in self.tensors or digest_values(self.tensors[name]) != digest:
                raise DamagedRecord(f"the plan was made for other values of {name}")

    def _signature(self, entry: Entry) -> Program:
        """A program that knows how to be called; its graph was not kept and says so when it is run."""
        outputs = _stored_structure(entry.outputs, "outputs")
        if outputs.num_leaves != len(entry.results):
            raise DamagedRecord(f"{len(entry.results)} results for {outputs.num_leaves} outputs")
        if entry.step is None:
            inputs = pytree.tree_structure((self.args, dict(self.kwargs)))
            name, names = type(self.model).__name__, positional_names(self.model, len(self.args))
        else:
            inputs = _stored_structure(entry.step.inputs, "inputs")
            name, names = entry.step.name, entry.step.parameters
        graph = fx.Graph()
        for number in range(inputs.num_leaves):
            graph.placeholder(f"input_{number}")
        graph.output((graph.call_function(_refuse_to_run),))
        return Program(fx.GraphModule(nn.Module(), graph), inputs, outputs, name, names)


def find_warm_start(
    model: object,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    options: Options,
    dynamic: bool | Mapping[str, Collection[int]],
    more: tuple[object, ...] = (),
) -> WarmStart | None:
    """Where to look for, and to keep, the plan of `model(*args, **kwargs)`; None where there can be no warm start.

    more: what else the plan follows from, as plain values.
    """
    environment = read_environment(pass_names())
    watched = options.after_pass is not None or environment.dump is not None or environment.verify
    if not options.warm or watched or options.lossy or not isinstance(model, nn.Module):
        return None
    began = time.perf_counter()
    cache = options.cache or Cache()
    fuel = options.fuel if options.fuel is not None else environment.fuel
    target = options.target or measured_target(cache)
    # These decide measured choices, and whether the compiled program was faster than torch.
    speed = (options.threads, torch.get_num_threads(), options.precision, environment.isa)
    facts = (options.guide, speed, options.skip | environment.skip, fuel, target, dynamic, more)
    digest = fingerprint(model, args, kwargs, facts)
    if digest is None:
        return None
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    key = make_key("warm start", digest)
    return WarmStart(key, model, args, kwargs, options, cache, tensors, ValueReads(tensors), began)


def _refuse_to_run() -> None:
    raise RuntimeError(
        "this program came from the cache, without its graph; compile it with Options(warm=False) to have one"
    )


def nesting(value: object) -> Structure:
    """How a value is nested: "leaf", ["tuple" or "list", parts ...], ["dict", key, part, key, part ...]."""
    if value is None:
        return "leaf"
    if type(value) in (tuple, list):
        assert isinstance(value, (tuple, list))
        return [type(value).__name__, *map(nesting, value)]
    if type(value) is dict and all(type(key) is str for key in value):
        return ["dict", *(part for key, inner in value.items() for part in (key, nesting(inner)))]
    raise NotStorable(
        f"a {type(value).__name__} among inputs or outputs; only tuples, lists and dicts by name are stored"
    )


def _stored_structure(text: str, what: str) -> pytree.TreeSpec:
    """The structure whose nesting was stored. Raises DamagedRecord."""
    try:
        return pytree.tree_structure(_nested(json.loads(text)))
    except (ValueError, RecursionError) as problem:
        raise DamagedRecord(f"{what}: {problem}") from problem


def _nested(structure: object) -> object:
    """The inverse of `nesting`; ValueError for anything else."""
    if structure == "leaf":
        return None
    if isinstance(structure, list) and structure and structure[0] in ("tuple", "list"):
        parts = [_nested(part) for part in structure[1:]]
        return tuple(parts) if structure[0] == "tuple" else parts
    if isinstance(structure, list) and structure and structure[0] == "dict" and len(structure) % 2:
        keys = structure[1::2]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_nested, structure[2::2]), strict=True))
    raise ValueError(f"{structure!r} is no structure of outputs")
