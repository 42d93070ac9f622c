"""Capture a model as a `Program`: functional ATen ops with composites kept and symbolic batch and sequence
sizes.

    program = capture(model, (input_ids,))
    logits = program.run(input_ids)

The way: flatten the inputs -> `torch.export` (non-strict) at sizes that coincide with nothing -> functional
graph with named weights -> **run at other sizes against the eager model before it is believed**.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Protocol

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from torchweld.graph.capture_errors import CaptureError, explain_failure, first_line, is_data_dependent
from torchweld.graph.capture_graph import functionalize, read_exported, to_program_form
from torchweld.graph.capture_inputs import Example, Family, Role, flatten_example
from torchweld.graph.capture_scan import keep_scans
from torchweld.graph.capture_source import record_sources
from torchweld.graph.capture_verify import Model, find_differences
from torchweld.graph.program import Program, SizeRange, StaticDim

# Sizes of the traced example: primes that no hidden size, head count or window of a real model equals, so
# that no comparison of sizes in the model comes out true by coincidence and fixes the dimension.
TRACED_SIZES: Mapping[Role, int] = {"batch": 7, "sequence": 29, "other": 31}
_check: Callable[[bool | torch.SymBool], None] = torch._check
PREFIX = "model."
NOISY = (
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._dynamo",
)
PLAIN = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool, str, type(None))


def capture(
    model: Model,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic: bool | Mapping[str, Collection[int]] = True,
    verify: bool = True,
) -> Program:
    """Capture `model(*args, **kwargs)` for inference, in evaluation mode and without autograd.

    `dynamic=True` lets dim 0 of every tensor and dim 1 of token-like and hidden-state tensors vary; a mapping
    {input name: dimensions} chooses; False fixes every size. What the model itself fixes is listed in
    `Program.static_dims`. With `verify` the program is run at further sizes, 1 among them, against the model;
    a dimension at which it then differs is captured again as fixed, with the reason.

    Raises `CaptureError`, naming the source line, when the model cannot be traced, has data-dependent
    control flow, writes to its inputs, or when the captured program differs from the model.
    """
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "function")
    example = flatten_example(model, args, dict(kwargs or {}), dynamic)
    with _inference(model):
        program, families = _capture_example(model, example, name)
        if not verify:
            return program
        report = find_differences(program, model, example, families)
        if report.culprits:
            # The graph is right only at the traced size along these dimensions: capture with them fixed.
            fixed = example.fixing(report.culprits)
            program, families = _capture_example(model, fixed, name)
            report = find_differences(program, model, fixed, families)
        if report.culprits or report.failure:
            why = report.failure or next(iter(report.culprits.values()))
            raise CaptureError(
                why,
                name,
                "the captured program to equal the model at a second size",
                "capture with dynamic=False, and report the model",
            )
        served = tuple(
            replace(size, low=1) if size.low == 2 and report.works_at_one else size for size in program.sizes
        )
        return replace(program, sizes=served)


def from_exported(exported: ExportedProgram, name: str = "exported") -> Program:
    """Bring an `ExportedProgram` into program form (weights under its state_dict names)."""
    functional = functionalize(exported, name)
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise CaptureError(
            "the exported program has no call signature",
            name,
            "in_spec and out_spec",
            "export the model again with torch.export.export",
        )
    specs = [spec for spec in functional.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    names = tuple(spec.arg.name for spec in specs)
    captured = to_program_form(read_exported(functional, {}, str, name), names, {})
    positional = in_spec.child(0).num_children
    return Program(captured.graph_module, in_spec, out_spec, name, names[:positional], guards=captured.guards)


def load_pt2(path: str | PathLike[str]) -> Program:
    """Read a `.pt2` file made by `torch.export.save`. The file counts as code: load only what you trust.

    Raises `CaptureError` when the file is missing, damaged, or no exported program."""
    try:
        exported = torch.export.load(path)
    except Exception as problem:
        raise CaptureError(
            f"the file cannot be read ({first_line(problem)})",
            str(path),
            "a file of torch.export.save",
            "export the model again with this version of torch",
        ) from problem
    return from_exported(exported, str(path))


class Seen:
    """What the last forward returned; an object of its own, because export restores a module's plain
    attributes."""

    out_spec: pytree.TreeSpec | None = None


class FlatModel(nn.Module):
    """`model` as a function of flat tensors: other inputs are constants, the output is a flat tuple."""

    def __init__(self, model: Model, example: Example) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.seen = Seen()

    def forward(self, *tensors: torch.Tensor) -> tuple[object, ...]:
        """Rebuild the call of the user's model around `tensors`."""
        self._tie_batches(tensors)
        leaves = list(self.example.leaves)
        for position, tensor in zip(self.example.tensor_positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.example.spec)
        results, out_spec = pytree.tree_flatten(self.model(*args, **kwargs))
        self.seen.out_spec = out_spec
        for result in results:
            if not isinstance(result, PLAIN):
                raise CaptureError(
                    f"the model returns a {type(result).__name__}",
                    type(self.model).__name__,
                    "tensors, numbers or None in tuples, lists, dicts or registered pytrees",
                    "return tensors, or register the type with torch.utils._pytree",
                )
        return tuple(results)

    def _tie_batches(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Tell the tracer that inputs with one batch size in the example have one batch size always.

        Nothing in a model says so (a mask could broadcast), and a second symbol for the batch would stay in
        every shape behind it."""
        batches: dict[Family, int | torch.SymInt] = {}
        for axis in self.example.axes:
            tensor = tensors[self.example.tensor_positions.index(axis.leaf)]
            if axis.role == "batch" and tensor.dim() > 1:
                size = batches.setdefault(axis.family, tensor.shape[axis.dim])
                _check(tensor.shape[axis.dim] == size)


@dataclass(frozen=True)
class Attempt:
    """One way to call torch.export: at which sizes, and whether inside the patches of
    transformers.exporters."""

    sizes: Mapping[Family, int]
    patched: bool


def _capture_example(model: Model, example: Example, name: str) -> tuple[Program, frozenset[Family]]:
    """Export and bring into program form; also which families of dimensions stayed symbolic."""
    flat = FlatModel(model, example)
    exported = _export(flat, example, name)
    inputs = {f"tensors_{i}": example.names[leaf] for i, leaf in enumerate(example.tensor_positions)}
    functional = functionalize(exported, name, inputs)
    constants = {i: leaf for i, leaf in enumerate(example.leaves) if i not in example.tensor_positions}
    own = _named_tensors(model) if isinstance(model, nn.Module) else {}
    traced = read_exported(functional, own, _own_name, name)
    captured = to_program_form(traced, example.names, constants, _own_name)
    out_spec = flat.seen.out_spec
    assert out_spec is not None
    program = Program(
        captured.graph_module, example.spec, out_spec, name, example.parameters, guards=captured.guards
    )
    return _describe_sizes(program, example, exported)


def _own_name(exported_name: str) -> str:
    """Name of a tensor in the user's model, from its name in `FlatModel`."""
    return exported_name.removeprefix(PREFIX)


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under every name they have; tied ones are the same object."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _export(flat: FlatModel, example: Example, name: str) -> ExportedProgram:
    """The first attempt that succeeds without fixing a dimension at a size that the user did not give."""
    failure: Exception | None = None
    for attempt in _attempts(flat.model, example):
        if failure is not None and is_data_dependent(failure) and not attempt.patched:
            continue  # other sizes cannot help
        try:
            exported = _export_once(flat, example, attempt)
        except CaptureError:
            raise
        except Exception as problem:  # whatever the model raises while it is traced
            failure = failure or problem
            continue
        if not _fixed_elsewhere(exported, example):
            return exported
    if failure is None:
        raise CaptureError(
            "torch.export fixes a dimension at a size that is not the example's",
            name,
            "sizes that are either free or the example's",
            "capture with dynamic=False",
        )
    try:
        flat(*_tensors(example, {}))
    except Exception as problem:
        raise CaptureError(
            f"the model itself fails on the example inputs ({first_line(problem)})",
            explain_failure(problem, name).place,
            "inputs that the model accepts",
            "correct the example inputs",
        ) from problem
    raise explain_failure(failure, name) from failure


def _attempts(model: Model, example: Example) -> Iterator[Attempt]:
    """Sizes that coincide with nothing, then nearly the user's, then exactly the user's."""
    free = {axis.family for axis in example.axes} - {axis.family for axis in example.axes if not axis.free}
    bumped = {axis.family: max(axis.size, 2) for axis in example.axes}
    traced = {**bumped, **{family: TRACED_SIZES[family[0]] for family in free}}
    unique = [sizes for i, sizes in enumerate((traced, bumped, {})) if sizes or i == 2]
    yield from (Attempt(sizes, patched=False) for sizes in unique)
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        yield from (Attempt(sizes, patched=True) for sizes in unique)


def _export_once(flat: FlatModel, example: Example, attempt: Attempt) -> ExportedProgram:
    specs: dict[int, dict[int, object]] = {position: {} for position in example.tensor_positions}
    for axis in example.axes:
        specs[axis.leaf][axis.dim] = Dim.AUTO
    patches = _transformers_patches(flat.model) if attempt.patched else contextlib.nullcontext()
    sources = record_sources(FlatModel.forward.__code__.co_filename)
    with (
        patches,
        keep_scans(),
        _clean_state(flat),
        sources,
        _silence(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return torch.export.export(
            flat, _tensors(example, attempt.sizes), dynamic_shapes=(tuple(specs.values()),), strict=False
        )


def _tensors(example: Example, sizes: Mapping[Family, int]) -> tuple[torch.Tensor, ...]:
    return tuple(leaf for leaf in example.resized(sizes) if isinstance(leaf, torch.Tensor))


def _fixed_elsewhere(exported: ExportedProgram, example: Example) -> bool:
    """Did export fix a dimension at a traced size that is not the user's own?"""
    shapes = _input_shapes(exported)
    fixed = [(axis, shapes[example.tensor_positions.index(axis.leaf)][axis.dim]) for axis in example.axes]
    return any(isinstance(size, int) and size != axis.size for axis, size in fixed)


def _input_shapes(exported: ExportedProgram) -> list[tuple[int | torch.SymInt, ...]]:
    users = {s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    return [
        tuple(node.meta["val"].shape)
        for node in exported.graph.find_nodes(op="placeholder")
        if node.name in users
    ]


def _describe_sizes(
    program: Program, example: Example, exported: ExportedProgram
) -> tuple[Program, frozenset[Family]]:
    """Note what stayed symbolic, in which range, and what became fixed."""
    shapes = _input_shapes(exported)
    ranges, fixed, families = [], [], set()
    for axis in example.axes:
        size = shapes[example.tensor_positions.index(axis.leaf)][axis.dim]
        if isinstance(size, int):
            fixed.append(StaticDim(example.names[axis.leaf], axis.dim, size, "the model fixes this size"))
            continue
        families.add(axis.family)
        low, high = _range_of(exported, size)
        ranges.append(SizeRange(example.names[axis.leaf], axis.dim, low, high))
    fixed += [StaticDim(example.names[a.leaf], a.dim, a.size, why) for a, why in example.fixed]
    return replace(program, sizes=tuple(ranges), static_dims=tuple(fixed)), frozenset(families)


def _range_of(exported: ExportedProgram, size: torch.SymInt) -> tuple[int, int | None]:
    """Smallest and largest value that export proved a symbolic size may take."""
    known = exported.range_constraints.get(size.node.expr)
    if known is None:
        return 2, None
    # Infinity comes in three spellings (sympy's, torch's integer one, and 2**63 - 1 minus a little).
    upper = float(known.upper)
    return int(float(known.lower)), int(upper) if upper < 2**31 else None


@contextlib.contextmanager
def _inference(model: Model) -> Iterator[None]:
    """Evaluation mode, no autograd, and no cache objects in the output (any `config.use_cache` is switched
    off)."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    configs = _caching_configs(modules)
    for module in training:
        module.training = False
    for config in configs:
        config.use_cache = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in configs:
            config.use_cache = True


class CachingConfig(Protocol):
    """A configuration that decides whether the model returns a cache."""

    use_cache: bool


def _caching_configs(modules: list[nn.Module]) -> list[CachingConfig]:
    """Every distinct configuration object of the modules with `use_cache` switched on."""
    configs = {
        id(config): config for module in modules if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in configs.values() if getattr(config, "use_cache", None) is True]


@contextlib.contextmanager
def _clean_state(model: nn.Module) -> Iterator[None]:
    """Put back plain tensor attributes that the model set while it was traced (they would be fake
    tensors)."""
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            for key, value in list(vars(module).items()):
                if isinstance(value, FakeTensor):
                    setattr(module, key, attributes.get(key))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No log lines from torch about attempts that fail: the one that counts ends in a `CaptureError`."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _transformers_patches(model: Model) -> Iterator[None]:
    """The reversible patches with which transformers exports its own models."""
    from transformers.exporters.exporter_dynamo import reset_model_state
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), reset_model_state(model):
        yield
