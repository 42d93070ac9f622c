"""From the graph that torch.compile hands to a backend to a `Program`.

Dynamo's graph calls torch functions and takes parameters as inputs beside the user's tensors and sizes. Two
steps: `capture_dynamo` traces it to functional ATen under Dynamo's own fake tensors when the backend is
called; `bind_inputs` turns the parameters into stored tensors when the first real call shows them.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from torchweld.graph.capture_errors import CaptureError, explain_failure
from torchweld.graph.capture_graph import Traced, to_program_form, without_autograd
from torchweld.graph.edit import drop_unused_tensors, fake_weight, writes
from torchweld.graph.program import Program, get_tensor, set_tensor, source_line

NAME = "torch.compile graph"
QUOTED = re.compile(r"\['([^']+)'\]|\.([A-Za-z_]\w*)")


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> Program:
    """Program of Dynamo's `graph_module`; `example_inputs` are its fake tensors and sizes, in placeholder
    order.

    Every placeholder stays an input, parameters included (see `bind_inputs`). Raises `CaptureError` when the
    graph cannot be traced or writes to its inputs."""
    names = tuple(_name(node) for node in graph_module.graph.find_nodes(op="placeholder"))
    try:
        traced = _trace(graph_module, _fake_inputs(graph_module, example_inputs))
    except CaptureError:
        raise
    except Exception as problem:
        raise explain_failure(problem, NAME) from problem
    captured = to_program_form(traced, names, {})
    in_spec = pytree.tree_structure((tuple(range(len(names))), {}))
    outputs = len(Program(captured.graph_module, in_spec, in_spec, NAME).outputs)
    out_spec = pytree.tree_structure(tuple(range(outputs)))
    return Program(captured.graph_module, in_spec, out_spec, NAME, names, guards=captured.guards)


def is_static(value: object) -> bool:
    """Is this real input of a Dynamo graph a parameter or buffer, which passes may treat as a constant?"""
    marked = getattr(value, "_dynamo_static_input_type", None) is not None
    return isinstance(value, torch.Tensor) and (isinstance(value, nn.Parameter) or marked)


def number_positions(program: Program) -> tuple[int, ...]:
    """Inputs that are Python floats of the model (an epsilon, a scale), which Dynamo passes as scalar
    tensors."""
    item = torch.ops.aten.item.default
    found = []
    for position, node in enumerate(program.placeholders):
        value = node.meta.get("val")
        scalar = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64
        if scalar and node.users and all(user.target is item for user in node.users):
            found.append(position)
    return tuple(found)


def bind_inputs(
    program: Program, tensors: Mapping[int, torch.Tensor], numbers: Mapping[int, float] | None = None
) -> Program:
    """A copy of `program` in which inputs at these positions are stored tensors (memory is shared) or
    constants.

    `numbers` are values for positions of `number_positions`; the result is right for these values only."""
    bound = program.copied()
    placeholders, mode = bound.placeholders, bound.fake_mode
    shared: dict[int, torch.Tensor] = {}
    for position, tensor in tensors.items():
        old, name = placeholders[position], bound.parameters[position]
        stored = shared.setdefault(id(tensor), without_autograd(tensor))
        set_tensor(bound.graph_module, name, stored)
        with bound.graph.inserting_after(placeholders[-1]):
            new = bound.graph.create_node("get_attr", name)
        new.meta.update({**old.meta, "val": fake_weight(mode, stored)})
        old.replace_all_uses_with(new)
    for position, number in (numbers or {}).items():
        for item in list(placeholders[position].users):
            _replace_by_constant(item, number)
    gone = {*tensors, *(numbers or {})}
    for position in gone:
        bound.graph.erase_node(placeholders[position])
    kept = tuple(name for i, name in enumerate(bound.parameters) if i not in gone)
    bound.graph_module.recompile()
    drop_unused_tensors(bound.graph_module)
    return replace(bound, parameters=kept, in_spec=pytree.tree_structure((tuple(range(len(kept))), {})))


def _replace_by_constant(node: fx.Node, number: float) -> None:
    """Write `number` where `node` was read."""

    def written(argument: fx.Node) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, written)
        user.kwargs = fx.node.map_arg(user.kwargs, written)
    node.graph.erase_node(node)


def _fake_inputs(graph_module: fx.GraphModule, example_inputs: Sequence[object]) -> tuple[object, ...]:
    """Fake values of all placeholders (the examples themselves may be real), with Dynamo's symbolic sizes.

    Dynamo gives a backend a fake mode of its own over the same sizes; its earlier fake tensors may not mix
    with it."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    values = [n.meta.get("example_value", e) for n, e in zip(placeholders, example_inputs, strict=True)]
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(values)
    if mode is None:
        return tuple(values)
    with mode:
        return tuple(_moved(value, mode) for value in values)


def _moved(value: object, mode: FakeTensorMode) -> object:
    if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is mode):
        return value
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if isinstance(value, FakeTensor) and isinstance(moved, FakeTensor) and value.item_memo is not None:
        moved.item_memo = (
            value.item_memo
        )  # a Python float of the model: a scalar tensor that knows its symbol
    return moved


def _trace(graph_module: fx.GraphModule, inputs: tuple[object, ...]) -> Traced:
    """Functional ATen with composites kept: traced above the dispatcher, where composites are still whole."""

    def flat(*args: object) -> tuple[object, ...]:
        with fx_traceback.preserve_node_meta():
            result = fx.Interpreter(graph_module).run(*args)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    with torch.no_grad(), contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        # "real" takes the inputs as they are: Dynamo's fake tensors. "symbolic" would invent sizes of its
        # own, for which Dynamo cannot write guards.
        if (mode := detect_fake_mode(inputs)) is not None:
            stack.enter_context(mode)
        traced = make_fx(flat, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
        writers = [node for node in traced.graph.nodes if node.op == "call_function" and writes(node)]
        if not writers:
            return Traced(traced, tuple(traced.graph.find_nodes(op="placeholder")), {})
        functional, signature = aot_export_module(traced, inputs, trace_joint=False, pre_dispatch=True)
    if signature.user_inputs_to_mutate or signature.buffers_to_mutate:
        raise CaptureError(
            "the compiled code writes to its inputs",
            source_line(writers[0]),
            "code that leaves its inputs alone",
            "return the new value instead of storing it",
        )
    assert isinstance(functional, fx.GraphModule)
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    placeholders = functional.graph.find_nodes(op="placeholder")
    stored = {
        n: (lifted[n.name], get_tensor(traced, lifted[n.name])) for n in placeholders if n.name in lifted
    }
    return Traced(functional, tuple(node for node in placeholders if node not in stored), stored)


def _name(node: fx.Node) -> str:
    """`layers.0.weight` for a parameter of the compiled module, else the placeholder's name."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    text = str(name() if callable(name) else name)
    if "_parameters" not in text and "_buffers" not in text:
        return node.name
    parts = [a or b for a, b in QUOTED.findall(text)]
    return ".".join(part for part in parts if part not in ("self", "_modules", "_parameters", "_buffers"))
