"""From `torch.export`'s graph to the form that `graph/program.py` promises.

before:  parameters and buffers as placeholders; in-place ops, assertions, autocast and grad-mode wrappers
after:   parameters and buffers as get_attr under their state_dict names; functional ops only
why:     `ExportedProgram.run_decompositions` traces everything again (half of the time of a capture), while
         most models have no in-place op at all; so it runs only for graphs that have one, where views make
         it necessary
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._functorch.predispatch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.capture_scan import SCANS, add_scan
from torchweld.graph.edit import erase_dead, fake_weight, writes
from torchweld.graph.program import find_fake_mode, source_line

aten = torch.ops.aten

KEPT_META = ("val", "stack_trace", "nn_module_stack")
WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
LOOP_ADVICE = "a recurrence over the sequence can be torch._higher_order_ops.scan, a running sum torch.cumsum"
VMAP_OPS = (torch._functorch.predispatch._add_batch_dim, torch._functorch.predispatch._remove_batch_dim)
IDENTITIES = (
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)
CONVERSIONS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.contiguous.default,
)
ASSERTIONS = (
    "_assert_tensor_metadata",
    "_assert_async",
    "_assert_scalar",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


@dataclass(frozen=True)
class Captured:
    """A graph in program form, and the assertions that were taken out of it."""

    graph_module: fx.GraphModule
    guards: tuple[str, ...]


def is_functional(exported: ExportedProgram) -> bool:
    """Does no node of the graph, sub-graphs included, write to an argument?"""
    modules = [m for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    return not any(_mutates(node) for module in modules for node in module.graph.nodes)


def functionalize(
    exported: ExportedProgram, name: str, input_names: Mapping[str, str] | None = None
) -> ExportedProgram:
    """Replace in-place ops by functional ones, keeping composites; CaptureError when an input or buffer is
    written."""
    if is_functional(exported):
        return exported
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        functional: ExportedProgram = exported.run_decompositions({})
    for output in functional.graph_signature.output_specs:
        if output.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            target = str(output.target)
            raise CaptureError(
                f"the forward writes to {(input_names or {}).get(target, target)!r}",
                _write_place(exported, name),
                "a forward that leaves its inputs and buffers alone",
                "return the new value instead of storing it",
            )
    return functional


def _write_place(exported: ExportedProgram, name: str) -> str:
    """Source line of the first node that writes into an input or buffer, directly or through views."""
    for node in exported.graph.nodes:
        if _mutates(node):
            written = node.args[0]
            while isinstance(written, fx.Node) and written.op == "call_function":
                written = written.args[0] if written.args else None
            if isinstance(written, fx.Node) and written.op == "placeholder":
                return source_line(node)
    return name


@dataclass(frozen=True)
class Traced:
    """What a tracer made: its graph, the placeholders that the caller fills, and those that are stored
    tensors."""

    graph_module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    stored: Mapping[fx.Node, tuple[str, torch.Tensor]]


def read_exported(
    exported: ExportedProgram, tensors: dict[str, torch.Tensor], rename: Callable[[str], str], name: str
) -> Traced:
    """Sort the placeholders of an exported program.

    `tensors` are the source model's own tensors by name (so that tied weights stay one object), `rename` maps
    export's names to them. Raises `CaptureError` for inputs that are neither values nor tensors."""
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    # Tied tensors go by the first of their names, as in `named_parameters`.
    first_names = {id(tensor): own_name for own_name, tensor in reversed(tensors.items())}
    inputs, stored = [], {}
    for node in exported.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        target = str(spec.target)
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        tensor = tensors.get(rename(target), exported.state_dict.get(target, exported.constants.get(target)))
        if not isinstance(tensor, torch.Tensor):
            raise CaptureError(
                f"the model holds {target!r}, a {spec.kind.name.lower()}",
                name,
                "weights, buffers and constants that are tensors",
                "remove it from the forward",
            )
        stored[node] = first_names.get(id(tensor), rename(target)), tensor
    return Traced(exported.graph_module, tuple(inputs), stored)


def to_program_form(
    traced: Traced,
    leaf_names: tuple[str, ...],
    constants: Mapping[int, object],
    rename: Callable[[str], str] = str,
) -> Captured:
    """Rewrite a traced, functional graph into program form.

    `leaf_names` name all placeholders of the result, `constants` holds the values of those that are baked in;
    `rename` is applied to the names of tensors which the graph itself holds."""
    builder = _Builder(traced, rename)
    builder.add_placeholders(leaf_names, constants)
    builder.add_body()
    erase_dead(builder.graph)
    builder.graph.lint()
    used = {str(node.target) for node in builder.graph.nodes if node.op == "get_attr"}
    attributes = {name: builder.attributes[name] for name in used}
    graph_module = fx.GraphModule(attributes, builder.graph, class_name="CapturedProgram")
    return Captured(graph_module, tuple(builder.guards))


class _Builder:
    """Copies nodes one by one; one object because the copy has much state."""

    def __init__(self, traced: Traced, rename: Callable[[str], str]) -> None:
        self.traced, self.rename = traced, rename
        self.graph = fx.Graph()
        self.mode = find_fake_mode(traced.graph_module.graph)
        self.attributes: dict[str, torch.Tensor] = {}
        self.shared: dict[int, torch.Tensor] = {}
        self.reads: dict[str, fx.Node] = {}
        self.guards: list[str] = []
        self.copies: dict[fx.Node, object] = {}

    def add_placeholders(self, leaf_names: tuple[str, ...], constants: Mapping[int, object]) -> None:
        """Inputs in order, then what is stored."""
        sources = iter(self.traced.inputs)
        for position, leaf_name in enumerate(leaf_names):
            node = self.graph.placeholder(_identifier(leaf_name))
            node.target = node.name  # two paths can give one identifier; fx makes only names unique
            if position in constants:
                node.meta["val"] = constants[position]
                continue
            source = next(sources)
            _copy_meta(source, node)
            self.copies[source] = node
        for source, (name, tensor) in self.traced.stored.items():
            if source.users:
                self.copies[source] = self._read(name, tensor, source)

    def add_body(self) -> None:
        """Everything between the placeholders and the output, and the output."""
        self._copy_body(self.traced.graph_module, self.copies)
        returned = self.traced.graph_module.graph.output_node().args[0]
        assert isinstance(returned, (tuple, list))
        self.graph.output(tuple(self._translated(list(returned), self.copies)))

    def _read(self, name: str, tensor: torch.Tensor, source: fx.Node) -> fx.Node:
        if name in self.reads and source.op == "placeholder":
            return self.reads[name]  # a tied weight: one tensor, one node
        self.attributes[name] = self._detached(tensor)
        node = self.graph.create_node("get_attr", name)
        _copy_meta(source, node)
        node.meta["val"] = fake_weight(self.mode, tensor)
        self.reads[name] = node
        return node

    def _detached(self, tensor: torch.Tensor) -> torch.Tensor:
        """Shares memory with `tensor` but takes no part in autograd; one object per source tensor."""
        if id(tensor) not in self.shared:
            self.shared[id(tensor)] = without_autograd(tensor)
        return self.shared[id(tensor)]

    def _copy_body(self, module: fx.GraphModule, copies: dict[fx.Node, object]) -> None:
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output") or node in copies:
                continue
            if node.op == "get_attr":
                self._copy_get_attr(module, node, copies)
            elif node.op == "call_function":
                self._copy_call(module, node, copies)
            elif node.op == "call_module" and _is_guard_module(node):
                self.guards.append(str(node.target))
            else:
                raise CaptureError(
                    f"{node.op} {node.target} in the exported graph",
                    source_line(node),
                    "calls of ATen ops",
                    "export the model with torch.export.export",
                )

    def _copy_get_attr(self, module: fx.GraphModule, node: fx.Node, copies: dict[fx.Node, object]) -> None:
        value: object = module
        for step in str(node.target).split("."):
            value = getattr(value, step)
        if isinstance(value, torch.Tensor):
            copies[node] = self._read(self.rename(str(node.target)), value, node)
        else:
            copies[node] = value  # the sub-graph of a wrapper: read when the wrapper is inlined

    def _copy_call(self, module: fx.GraphModule, node: fx.Node, copies: dict[fx.Node, object]) -> None:
        target = node.target
        if _is_assertion(node):
            self.guards.append(_assertion_text(node))
        elif isinstance(target, torch._ops.HigherOrderOperator):
            copies[node] = self._scan(node, copies) if str(target) in SCANS else self._inline(node, copies)
        elif target is operator.getitem and isinstance(whole := self._inlined(node, copies), tuple):
            index = node.args[1]
            assert isinstance(index, int)
            copies[node] = whole[index]
        elif target in VMAP_OPS and node.users:
            raise _vmap_refusal(node)
        elif (same := _same_as(node)) is not None:
            copies[node] = copies[same]
        else:
            copies[node] = self._plain_copy(node, copies)

    def _inlined(self, node: fx.Node, copies: Mapping[fx.Node, object]) -> object:
        """What the first argument of `node` became: a tuple where it was a wrapper whose body was inlined."""
        source = node.args[0]
        return copies.get(source) if isinstance(source, fx.Node) else None

    def _plain_copy(self, node: fx.Node, copies: dict[fx.Node, object]) -> fx.Node:
        args = self._translated(node.args, copies)
        kwargs = self._translated(node.kwargs, copies)
        copy = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        _copy_meta(node, copy)
        return copy

    def _scan(self, node: fx.Node, copies: dict[fx.Node, object]) -> tuple[object, ...]:
        """What stands for a scan; the values it returns."""
        body, *operands = self._translated(node.args, copies)
        return add_scan(self.graph, node, body, tuple(operands), self.mode, self._read)

    def _inline(self, node: fx.Node, copies: dict[fx.Node, object]) -> tuple[object, ...]:
        """Body of a grad-mode or autocast wrapper, in place of the wrapper; the values it returns."""
        target = node.target
        assert isinstance(target, torch._ops.HigherOrderOperator)
        bodies = [
            copies[arg]
            for arg in node.args
            if isinstance(arg, fx.Node)
            and arg.op == "get_attr"
            and isinstance(copies.get(arg), fx.GraphModule)
        ]
        wrapper = str(target)
        autocast_on = wrapper == "wrap_with_autocast" and node.args[2] is not False
        if wrapper not in WRAPPERS or len(bodies) != 1 or autocast_on:
            raise CaptureError(
                f"the control-flow operator {wrapper}",
                source_line(node),
                "straight-line tensor code",
                LOOP_ADVICE
                if wrapper == "while_loop"
                else "compute both branches and select with torch.where",
            )
        body = bodies[0]
        assert isinstance(body, fx.GraphModule)
        position = next(
            i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and copies.get(arg) is body
        )
        inner: dict[fx.Node, object] = {}
        for placeholder, arg in zip(
            body.graph.find_nodes(op="placeholder"), node.args[position + 1 :], strict=True
        ):
            inner[placeholder] = self._translated(arg, copies)
        self._copy_body(body, inner)
        returned = self._translated(body.graph.output_node().args[0], inner)
        return tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)

    def _translated(self, argument: object, copies: Mapping[fx.Node, object]) -> Any:
        return fx.node.map_arg(cast(Any, argument), lambda node: cast(Any, copies[node]))


def _vmap_refusal(node: fx.Node) -> CaptureError:
    """Why the inside of a vmap is no part of a program: it means something between two calls of functorch only."""
    return CaptureError(
        "torch.vmap in the exported graph, or an associative_scan that torch.export unrolled for one length",
        source_line(node),
        "operations on whole batches",
        "capture the model itself, which keeps an associative_scan; spell a vmap out",
    )


def without_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without autograd; parameters stay parameters."""
    detached = tensor.detach()
    return nn.Parameter(detached, requires_grad=False) if isinstance(tensor, nn.Parameter) else detached


def _same_as(node: fx.Node) -> fx.Node | None:
    """The argument that `node` merely passes on: identities, inactive dropout, conversions to what already
    is."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in IDENTITIES:
        active = "dropout" in str(node.target) and (
            node.args[2] if len(node.args) > 2 else node.kwargs.get("train")
        )
        return None if active else source
    if node.target in CONVERSIONS and not node.kwargs.get("copy", False) and True not in node.args[2:4]:
        before, after = source.meta.get("val"), node.meta.get("val")
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            unchanged = before.dtype == after.dtype and before.device == after.device
            # `contiguous` is about layout only, and layout is no property of a value in this graph's
            # meaning, but a later `view` relies on it: drop it only where the layout already is what was
            # asked for.
            return source if unchanged and (before is after or _same_layout(before, after)) else None
    return None


def _same_layout(before: torch.Tensor, after: torch.Tensor) -> bool:
    return len(before.stride()) == len(after.stride()) and all(
        str(left) == str(right) for left, right in zip(before.stride(), after.stride(), strict=True)
    )


def _is_assertion(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::") in ASSERTIONS
    return target is torch._check


def _assertion_text(node: fx.Node) -> str:
    details = ", ".join([*(str(arg) for arg in node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    return f"{str(node.target).removeprefix('aten.')}({details}) at {source_line(node)}"


def _mutates(node: fx.Node) -> bool:
    if node.target is aten.detach_.default:
        return False
    return node.op == "call_function" and writes(node)


def _is_guard_module(node: fx.Node) -> bool:
    return str(node.target).startswith("_guards_fn")


def _copy_meta(source: fx.Node, copy: fx.Node) -> None:
    for key in KEPT_META:
        if key in source.meta:
            copy.meta[key] = source.meta[key]


def _identifier(name: str) -> str:
    clean = "".join(c if c.isalnum() else "_" for c in name)
    return clean if clean and not clean[0].isdigit() else f"input_{clean}"
