"""Group graphs without real operations: every node stacks what it reads, every set of groups has a kernel or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sympy import Integer
from torch import fx

from torchweld.graph.groups import Group, GroupGraph, Work
from torchweld.graph.rewrite import Refusal

Kernels = Callable[[Group], "StubKernel | Refusal"]


@dataclass(frozen=True)
class StubKernel:
    """A kernel that is only its work; the test prices it by its bytes read."""

    work: Work


def microseconds(*amounts: float) -> StubKernel:
    """A kernel whose price is the sum of `amounts`."""
    return StubKernel(Work(Integer(int(sum(amounts))), Integer(0), Integer(0), 1))


def one_launch_each(group: Group) -> StubKernel:
    """10 microseconds per kernel and 1 per operation."""
    return microseconds(10, len(group.nodes))


def stub_graph(edges: Sequence[tuple[int, ...]], kernels: Kernels = one_launch_each) -> GroupGraph:
    """Node `n<i>` reads an input and the earlier nodes in edges[i]; group numbers are node numbers."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(2)
    nodes: list[fx.Node] = []
    for number, operands in enumerate(edges):
        read = [source, *(nodes[operand] for operand in operands)]
        node = graph.create_node("call_function", torch.ops.aten.stack.default, (read,), name=f"n{number}")
        node.meta["val"] = torch.empty(2)
        nodes.append(node)
    graph.output(tuple(nodes))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return GroupGraph.of(module, kernels, lambda work: float(work.reads), {})
