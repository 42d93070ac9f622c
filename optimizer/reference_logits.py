"""Logits of a language model in float64, for texts whose logits would not fit into memory at once.

reference = split_reference(program)
hidden = reference.hidden(ids)                # float64 [S, d], of the whole text
reference.logits(hidden[start:end])           # float64 [end - start, V]

It is the captured graph, in front of all passes, cut in two where its output head begins (passes/expose_hidden.py).
Only where the head cannot be seen there (a matmul in another spelling) the canonical graph takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from torchweld.graph.edit import erase_dead
from torchweld.graph.float64 import reference_float64
from torchweld.graph.float64_pieces import Float64PieceInterpreter
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.optimizer.compile_step import normalise
from torchweld.passes.expose_hidden import expose_hidden


@dataclass(frozen=True)
class ReferenceLogits:
    """The graph up to the last hidden state, and the head from there on; their tensors are the program's."""

    body: fx.GraphModule
    head: fx.GraphModule

    def hidden(self, ids: Tensor) -> Tensor:
        """int64 [S] -> float64 [S, d]."""
        return _run(self.body, ids[None])

    def logits(self, hidden: Tensor) -> Tensor:
        """float64 [R, d] -> float64 [R, V]. The weights of the head are decoded again at every call."""
        return _run(self.head, hidden[None])


def split_reference(program: Program) -> ReferenceLogits | Refusal:
    """The reference of a captured program of ids [B, S] -> logits [B, S, V]; or why its head cannot be told apart."""
    found = expose_hidden(program)
    if isinstance(found, Refusal):
        program = normalise(program)[0]
        found = expose_hidden(program)
    if isinstance(found, Refusal):
        return found
    copy = program.copied()
    output = copy.graph.output_node()
    output.args = (tuple(node for node in copy.graph.nodes if node.name == found.hidden),)
    erase_dead(copy.graph)
    copy.graph_module.recompile()
    return ReferenceLogits(copy.graph_module, found.head.graph_module)


def _run(graph_module: fx.GraphModule, value: Tensor) -> Tensor:
    """The one result of a graph of one input, without the batch of one."""
    (result,) = reference_float64(graph_module, (value,), Float64PieceInterpreter)
    assert isinstance(result, Tensor)
    return result[0]
