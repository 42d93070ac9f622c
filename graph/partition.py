"""The group graph as a runnable graph: every group is a `call_module` of a small sub-graph.

The sub-graph of a group takes its tensors and the sizes that it needs, and returns the values that others read.  Free
nodes (views, sources) are copied into every group that reads through them, and stay in the outer graph only where the
graph's result, or an operation without a kernel, is such a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from torchweld.graph.groups import Group, GroupGraph, has_tensor, is_free


@dataclass(frozen=True)
class SubGraph:
    """A group on its own: `module` takes `inputs` (tensors first, then sizes) and returns a tuple of `outputs`."""

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def extract(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], name: str = "group") -> SubGraph:
    """The sub-graph that computes `outputs` from what `nodes` (operands before users) read from outside."""
    members = set(nodes)
    tensors: dict[fx.Node, None] = {}
    sizes: dict[fx.Node, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in members:
                (tensors if has_tensor(operand) else sizes)[operand] = None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for outer in (*tensors, *sizes):
        copies[outer] = graph.placeholder(outer.name)
        copies[outer].meta = dict(outer.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return SubGraph(fx.GraphModule(torch.nn.Module(), graph, name), (*tensors, *sizes), tuple(outputs))


def extract_group(group: Group, name: str = "group") -> SubGraph:
    """A group's sub-graph."""
    return extract(group.inside, group.outputs, name)


def free_tail(node: fx.Node, finished: set[fx.Node]) -> list[fx.Node]:
    """The free nodes (operands first) that stand between finished values and `node`, itself included."""
    order: dict[fx.Node, None] = {}

    def visit(current: fx.Node) -> None:
        if current in order or current in finished or not is_free(current):
            return
        for operand in current.all_input_nodes:
            visit(operand)
        order[current] = None

    visit(node)
    return list(order)


def fused_module(groups: GroupGraph, names: dict[int, str]) -> fx.GraphModule:
    """The whole graph with every group as a call of its sub-graph; runs as the source graph does.

    names: a module name per group number (several groups may share a kernel's name; numbers are appended).
    """
    source = groups.graph_module
    root = torch.nn.Module()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            copies[node] = graph.node_copy(node)
            continue
        if node.op == "output":
            break
        if not has_tensor(node):
            _copy_sizes(node, graph, copies)
    for group in groups.topological():
        sub = extract_group(group, names[group.id])
        name = f"{names[group.id]}_{group.id}"
        root.add_module(name, sub.module)
        for outer in sub.inputs:
            _copy_sizes(outer, graph, copies)
        call = graph.create_node("call_module", name, tuple(copies[outer] for outer in sub.inputs))
        for position, output in enumerate(sub.outputs):
            copies[output] = graph.call_function(getitem, (call, position))
            copies[output].meta = dict(output.meta)
    result = source.graph.output_node().args[0]
    for node in source.graph.output_node().all_input_nodes:
        _copy_sizes(node, graph, copies)
    graph.output(fx.node.map_arg(result, copies.__getitem__))
    return fx.GraphModule({**_attributes(source, graph), **dict(root.named_children())}, graph, "Fused")


def getitem(values: Sequence[torch.Tensor], position: int) -> torch.Tensor:
    """One result of a group."""
    return values[position]


def _copy_sizes(node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    """Copy `node` and what it reads into the outer graph, as far as nothing there stands for it yet.

    Sizes may read shapes of values that do not exist yet; such nodes are copied when their operands are there.
    """
    if node in copies:
        return
    for operand in node.all_input_nodes:
        _copy_sizes(operand, graph, copies)
        if operand not in copies:
            return
    if node.op == "call_function" and (is_free(node) or not has_tensor(node)):
        copies[node] = graph.node_copy(node, copies.__getitem__)


def _attributes(source: fx.GraphModule, graph: fx.Graph) -> dict[str, object]:
    found: dict[str, object] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value: object = source
            for step in str(node.target).split("."):
                value = getattr(value, step)
            found[str(node.target)] = value
    return found
