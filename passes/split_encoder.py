"""Split the encoder off a program: what a decoder reads of its other inputs, as a program of its own.

before:  logits = f(tokens, source)
after:   encoded = encoder(source)                   keys, values and masks of every cross attention
         logits, caches = step(tokens, ..., encoded, caches)          (passes/step_cross.py)
why:     a source is encoded once, not once per token
legal:   nothing of it depends on the tokens (graph/sequence_encoder.py); masks that are the same for every row of the
         decoder are computed for one row
source:  every encoder-decoder's own cache; here the cut follows from the analysis, whatever the encoder is
"""

from __future__ import annotations

from typing import Any, Final

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx

from torchweld.graph.edit import drop_unused_tensors, erase_dead, insert_node
from torchweld.graph.match import aten, dim_key, is_tensor, shape_of, tensor_of
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence import SequenceAnalysis

NAME: Final = "split_encoder"


def split_encoder(program: Program, found: SequenceAnalysis) -> Program | Refusal:
    """The program of `found.encoded`, with the inputs that it reads as keyword arguments; `program` stays as it is."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    needed = _needed(found)
    for node in program.placeholders:
        if node in needed and is_tensor(node) and node is not found.tokens:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
    end = graph.output(())
    sizes = _Sizes(found, graph, end, copies)
    for node in program.graph.nodes:
        if node not in needed or node in copies or node is found.tokens:
            continue
        copy = sizes.copy(node)
        if copy is None:
            return Refusal("the encoder needs the batch, which none of its inputs has", node)
        copies[node] = copy
    end.args = (tuple(copies[value] for value in found.encoded),)
    erase_dead(graph)
    graph.lint()
    module = fx.GraphModule(program.graph_module, graph)
    drop_unused_tensors(module)
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    return Program(
        module,
        in_spec=pytree.tree_flatten(((), dict.fromkeys(names, 0)))[1],
        out_spec=pytree.tree_structure(tuple(range(len(found.encoded)))),
        name=f"{program.name} encoder",
        sizes=tuple(size for size in program.sizes if size.input in names),
        static_dims=tuple(size for size in program.static_dims if size.input in names),
        guards=program.guards,
    )


def _needed(found: SequenceAnalysis) -> set[fx.Node]:
    """What the encoded values are made of; the tokens among it only lend their sizes, dtype and device."""
    seen = set(found.encoded)
    pending = list(found.encoded)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return seen


class _Sizes:
    """Copies nodes, with one row for the decoder and the batch read from an input of the encoder."""

    def __init__(
        self, found: SequenceAnalysis, graph: fx.Graph, end: fx.Node, copies: dict[fx.Node, Any]
    ) -> None:
        self.found, self.graph, self.end, self.copies = found, graph, end, copies
        self.batch: fx.Node | None = None

    def copy(self, node: fx.Node) -> Any:
        """The copy of a node: a node, or a number; None where the batch is needed and unknown."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self._size(node, dim_key(value))
        if node.op == "get_attr":
            with self.graph.inserting_before(self.end):
                copied = self.graph.create_node("get_attr", str(node.target))
            copied.meta = dict(node.meta)
            return copied
        if self.found.tokens in node.all_input_nodes and self.found.tokens not in self.copies:
            stand = self._zeros_for_tokens(node)
            if stand is None:
                return None
            self.copies[self.found.tokens] = stand
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.copies.__getitem__)
        return self._make(node.target, args, kwargs, node)

    def _size(self, node: fx.Node, size: Any) -> Any:
        alone = sympy.sympify(size).subs(self.found.symbol, 1)
        if alone.is_Integer:
            return int(alone)
        if alone == self.found.batch:
            return self._batch(node)
        args = fx.node.map_arg(node.args, self.copies.__getitem__)
        if any(isinstance(arg, fx.Node) for arg in args):
            return self._make(node.target, args, {}, node)
        return node.target(*args)  # type: ignore[operator]

    def _batch(self, like: fx.Node) -> fx.Node | None:
        """The number of sequences, read from the first input that has it."""
        if self.batch is None:
            for source in self.graph.find_nodes(op="placeholder"):
                shape = shape_of(source)
                if self.found.batch in shape:
                    axis = shape.index(self.found.batch)
                    self.batch = self._make(aten.sym_size.int, (source, axis), {}, like)
                    break
        return self.batch

    def _zeros_for_tokens(self, like: fx.Node) -> fx.Node | None:
        """What lends its size, dtype and device where the tokens did."""
        tokens = tensor_of(self.found.tokens)
        batch = self._batch(like)
        if batch is None:
            return None
        shape = [batch, 1, *(int(size) for size in tokens.shape[2:])]
        options = {"dtype": tokens.dtype, "device": tokens.device}
        return self._make(aten.full.default, (shape, 0), options, like)

    def _make(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        return insert_node(self.graph, self.end, target, args, kwargs, made_by=NAME, like=like)
