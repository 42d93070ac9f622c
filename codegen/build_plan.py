"""From the group graph to a plan: launches of kernels, eager steps where a group has none, and the results.

Kernels get names of their own here: two different kernels of one name are told apart by a number, the many launches of
one kernel share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import Tensor, fx

from torchweld.codegen.ir import Kernel
from torchweld.codegen.library_call import LibraryCall, library_call
from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.naming import unique
from torchweld.codegen.pieces import APPEND
from torchweld.codegen.plan import EagerStep, Launch, Plan, Step, ValueSpec
from torchweld.graph.groups import Group, GroupGraph, has_tensor, is_free
from torchweld.graph.meaning.context import Unsupported, scalar_expr, shape_of, tensor_of
from torchweld.graph.partition import free_tail
from torchweld.graph.program import get_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class BuiltPlan:
    """A plan, which step serves which group, and what the graph returns.

    step_groups: the group number of every step (None: the views of the results).
    results: per entry of the graph's output, the position in the plan's outputs, or the constant itself.
    tensor_inputs: positions of the placeholders that are tensors (the plan's inputs, in order).
    not_in_library: why a kernel with a matmul has no form in ATen, by name.
    """

    plan: Plan
    step_groups: tuple[int | None, ...]
    results: tuple[tuple[int | None, object], ...]
    tensor_inputs: tuple[int, ...]
    not_in_library: Mapping[str, str] = field(default_factory=dict)


class PlanRefused(RuntimeError):
    """The graph cannot be planned at all; the message names the node or size and why."""


def build_plan(groups: GroupGraph) -> BuiltPlan:
    """The plan of a fused graph; PlanRefused names what makes it impossible (sizes that no input gives)."""
    graph = groups.graph_module.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    tensor_inputs = tuple(i for i, node in enumerate(placeholders) if has_tensor(node))
    inputs = tuple(_spec(placeholders[i]) for i in tensor_inputs)
    sizes = _bound_sizes(inputs)
    constants = {
        n.name: get_tensor(groups.graph_module, str(n.target)) for n in graph.find_nodes(op="get_attr")
    }
    finished = {placeholders[i] for i in tensor_inputs} | set(graph.find_nodes(op="get_attr"))
    writer = _EagerWriter(sizes)
    kernels = _KernelNames()
    steps: list[Step] = []
    step_groups: list[int | None] = []
    values: dict[str, ValueSpec] = {}
    forms: dict[str, LibraryCall | str | None] = {}
    for group in groups.topological():
        lowered = groups.lowered.get(group.id)
        if isinstance(lowered, LoweredGroup):
            launch = _launch(group, lowered, kernels)
            if launch.kernel.name not in forms:
                forms[launch.kernel.name] = library_call(group, lowered)
            steps.append(launch)
            values |= {node.name: _spec(node) for node in group.outputs}
        else:
            results = [n for n in group.nodes if isinstance(n.meta.get("val"), Tensor)]
            steps.append(writer.step(group.nodes, results, finished, group.eager or "no kernel"))
        step_groups.append(group.id)
        finished |= set(group.nodes)
    outputs, results_map, tail = _results(graph, finished, writer)
    if tail is not None:
        steps.append(tail)
        step_groups.append(None)
    updated = {name for step in steps if isinstance(step, Launch) for name in step.updated()}
    appends = graph.find_nodes(op="call_function", target=APPEND)
    in_place = {node.name: node.args[0].name for node in appends if node.name in updated}
    library = {name: form for name, form in forms.items() if isinstance(form, LibraryCall)}
    plan = Plan(inputs, constants, values, tuple(steps), outputs, tuple(sizes), in_place, library)
    missing = {s for step in plan.launches() for s in step.kernel.sizes} - set(sizes)
    if missing:
        raise PlanRefused(f"sizes {', '.join(sorted(missing))} are no whole dimension of any input")
    refused = {name: form for name, form in forms.items() if isinstance(form, str)}
    return BuiltPlan(plan, tuple(step_groups), results_map, tensor_inputs, refused)


def _spec(node: fx.Node) -> ValueSpec:
    try:
        return ValueSpec(node.name, tensor_of(node).dtype, shape_of(node))
    except Unsupported as problem:
        raise PlanRefused(str(problem)) from problem


def _bound_sizes(inputs: Sequence[ValueSpec]) -> list[str]:
    symbols = {extent.name for spec in inputs for extent in spec.shape if isinstance(extent, sympy.Symbol)}
    return sorted(symbols, key=lambda name: (len(name), name))


class _KernelNames:
    """Different kernels of one name get numbers; a kernel keeps its name over all launches."""

    def __init__(self) -> None:
        self._renamed: dict[int, Kernel] = {}
        self._keep: list[Kernel] = []
        self._taken: set[str] = set()

    def __call__(self, kernel: Kernel) -> Kernel:
        if id(kernel) not in self._renamed:
            name = unique(kernel.name, self._taken)
            self._taken.add(name)
            self._keep.append(kernel)
            self._renamed[id(kernel)] = kernel if name == kernel.name else replace(kernel, name=name)
        return self._renamed[id(kernel)]


def _launch(group: Group, lowered: LoweredGroup, kernels: _KernelNames) -> Launch:
    read = [group.inputs[position].name for position in lowered.input_positions]
    return Launch(kernels(lowered.kernel), (*read, *(node.name for node in group.outputs)))


class _EagerWriter:
    """Writes the sub-graphs of eager steps: tensors and sizes come in by name, sizes made of others are computed."""

    def __init__(self, sizes: Sequence[str]) -> None:
        self.sizes = frozenset(sizes)

    def step(
        self, nodes: Sequence[fx.Node], results: Sequence[fx.Node], finished: set[fx.Node], reason: str
    ) -> EagerStep:
        """A step that computes `nodes` (and the views they read through) from finished values."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        arguments: list[str] = []
        computed = set(nodes)

        def place(name: str) -> fx.Node:
            arguments.append(name)
            return graph.placeholder(name)

        size_inputs: dict[str, fx.Node] = {}

        def visit(node: fx.Node) -> None:
            if node in copies:
                return
            symbol = self._size_name(node)
            if symbol is not None:
                copies[node] = size_inputs.setdefault(symbol, size_inputs.get(symbol) or place(symbol))
            elif node in finished:
                copies[node] = place(node.name)
            elif node in computed or is_free(node) or not has_tensor(node):
                for operand in node.all_input_nodes:
                    visit(operand)
                copies[node] = graph.node_copy(node, copies.__getitem__)
            else:
                raise PlanRefused(f"{node.name} is read before it is computed")

        for node in nodes:
            visit(node)
        graph.output(tuple(copies[node] for node in results))
        _placeholders_first(graph)
        module = fx.GraphModule(torch.nn.Module(), graph, "Eager")
        return EagerStep(module, tuple(arguments), tuple(node.name for node in results), reason)

    def _size_name(self, node: fx.Node) -> str | None:
        """The size symbol that a node is, if it is just that."""
        if has_tensor(node) or not isinstance(node.meta.get("val"), torch.SymInt):
            return None
        try:
            expr = scalar_expr(node)
        except Unsupported:
            return None
        return expr.name if isinstance(expr, sympy.Symbol) and expr.name in self.sizes else None


def _placeholders_first(graph: fx.Graph) -> None:
    """Placeholders have to stand before everything else; they are in argument order already."""
    root = graph._root
    last = root
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        last.append(node)
        last = node


def _results(
    graph: fx.Graph, finished: set[fx.Node], writer: _EagerWriter
) -> tuple[tuple[str, ...], tuple[tuple[int | None, object], ...], EagerStep | None]:
    """Names of the returned values; views among them, and inputs handed through, come from one last eager step."""
    returned = graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    views = [n for n in dict.fromkeys(returned) if isinstance(n, fx.Node) and n not in finished]
    tail = None
    if views:
        order: dict[fx.Node, None] = {}
        for view in views:
            order |= dict.fromkeys(free_tail(view, finished))
            order[view] = None
        tail = writer.step(list(order), views, finished, "views of results")
    names: list[str] = []
    results: list[tuple[int | None, object]] = []
    for entry in returned:
        if isinstance(entry, fx.Node):
            results.append((len(names), None))
            names.append(entry.name)
        else:
            results.append((None, entry))
    return tuple(names), tuple(results), tail
