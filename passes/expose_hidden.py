"""Let a program return its last hidden state beside the logits, and cut out its output head.

before:  logits = f(linear(h, w))                          h [B, S, d], f pointwise (a soft cap, a cast)
after:   cat([f(linear(h, w)), h], -1)                     [B, S, V + d], and a program head: h -> f(linear(h, w))
why:     heads that guess later tokens read h, and share w with the model (Medusa)
legal:   walking up from the logits, one value depends on the tokens at every step, until a linear whose weight
         does not; h has the logits' batch and sequence axes; nothing behind h reads sizes other than those
source:  Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads (2024)

One tensor comes out, so that whatever takes a program with logits (the cache derivation) takes this one: rows that
are not asked for are computed neither in V nor in d. It wants a canonical graph, where every matmul is `linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch.utils._pytree as pytree
from torch import fx

from torchweld.graph.edit import SIZE_OF, insert_node
from torchweld.graph.match import aten, dim_key, dtype_of, is_call, is_tensor, rank_of, shape_of
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Exactness, Refusal

NAME: Final = "expose_hidden"
EXACTNESS: Exactness = "exact"


@dataclass(frozen=True)
class Exposed:
    """program: ids [B, S] -> [B, S, vocabulary + features], the logits and behind them the hidden state, both of the
    logits' dtype. head: hidden [B, S, features] -> logits [B, S, vocabulary]. hidden: the node's name."""

    program: Program
    head: Program
    vocabulary: int
    features: int
    hidden: str


def expose_hidden(program: Program) -> Exposed | Refusal:
    """The program with its last hidden state in the output, and its head; or why there is no such state.

    `program` stays as it is; the refusal names a node of it.
    """
    found = find_head(program)
    if isinstance(found, Refusal):
        return found
    hidden: Any = found.args[0]
    head = _cut_head(program, hidden)
    if isinstance(head, Refusal):
        return head
    exposed = program.copied()
    nodes = {node.name: node for node in exposed.graph.nodes}
    output = exposed.graph.output_node()
    logits: Any = exposed.outputs[_place_of_logits(exposed)]
    state = nodes[hidden.name]
    if dtype_of(state) != dtype_of(logits):
        cast = {"dtype": dtype_of(logits)}
        state = insert_node(
            exposed.graph, output, aten._to_copy.default, (state,), cast, made_by=NAME, like=state
        )
    joined = insert_node(
        exposed.graph, output, aten.cat.default, ([logits, state], -1), made_by=NAME, like=logits
    )
    output.replace_input_with(logits, joined)
    exposed.graph_module.recompile()
    vocabulary, features = shape_of(logits)[-1], shape_of(hidden)[-1]
    return Exposed(exposed, head, vocabulary, features, hidden.name)


def find_head(program: Program) -> fx.Node | Refusal:
    """The linear that makes the logits: the first one up from them. See `legal` above."""
    found = [value for value in program.outputs if isinstance(value, fx.Node)]
    if len(found) != 1:
        return Refusal(f"one output, the logits, is expected; the graph returns {len(found)}")
    logits = node = found[0]
    follows = _following(program)
    while not is_call(node, aten.linear.default):
        sources = [source for source in node.all_input_nodes if source in follows]
        if len(sources) != 1:
            made = f"is made of {len(sources)} values that depend on the tokens"
            return Refusal(f"no output head: {node.target} {made}; expected one linear layer", node)
        node = sources[0]
    return _check_head(node, logits, follows) or node


def _check_head(linear: fx.Node, logits: fx.Node, follows: set[fx.Node]) -> Refusal | None:
    """The clauses of `legal` about the linear itself."""
    hidden, weight = linear.args[:2]
    if not isinstance(hidden, fx.Node) or hidden not in follows or weight in follows:
        return Refusal("the last linear multiplies by values that depend on the tokens", linear)
    if rank_of(hidden) != 3 or rank_of(logits) != 3 or shape_of(hidden)[:2] != shape_of(logits)[:2]:
        shapes = f"{list(shape_of(hidden))} -> {list(shape_of(logits))}"
        return Refusal(f"the output head is {shapes}; expected [B, S, d] -> [B, S, V]", linear)
    if not all(isinstance(shape_of(node)[-1], int) for node in (hidden, logits)):
        return Refusal("the hidden size or the vocabulary varies", linear)
    return None


def _following(program: Program) -> set[fx.Node]:
    """Tensors that depend on the values of an input (not only on its sizes)."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if is_tensor(node) and (
            node.op == "placeholder" or any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _place_of_logits(program: Program) -> int:
    """Where in the outputs the one node stands."""
    return next(place for place, value in enumerate(program.outputs) if isinstance(value, fx.Node))


class _Unfit(Exception):
    """A node behind the hidden state that a head of its own cannot have."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


def _cut_head(program: Program, hidden: fx.Node) -> Program | Refusal:
    """The program from the hidden state to the logits; its tensors are shared."""
    graph = fx.Graph()
    start = graph.placeholder("hidden")
    start.meta.update(hidden.meta)
    logits: Any = program.outputs[_place_of_logits(program)]
    try:
        graph.output((_copier(graph, hidden, start)(logits),))
    except _Unfit as unfit:
        return unfit.refusal
    return replace(
        program,
        graph_module=fx.GraphModule(program.graph_module, graph),
        in_spec=pytree.tree_structure(((hidden.name,), {})),
        out_spec=pytree.tree_structure("logits"),
        name=f"{program.name} output head",
        parameters=("hidden",),
        sizes=(),
        static_dims=(),
        guards=(),
    )


def _copier(graph: fx.Graph, hidden: fx.Node, start: fx.Node) -> Callable[[fx.Node], fx.Node]:
    """Copies a node and all that it reads into `graph`, up to `hidden`, in whose place `start` stands."""
    known = {hidden: start}
    sizes = dict(zip(shape_of(hidden), range(3), strict=True))

    def copy(node: fx.Node) -> fx.Node:
        if node in known:
            return known[node]
        if node.op == "placeholder":
            raise _Unfit(Refusal("the output head reads the tokens beside the hidden state", node))
        if node.target is SIZE_OF:
            known[node] = size(node)
        else:
            for source in node.all_input_nodes:
                copy(source)
            known[node] = graph.node_copy(node, known.__getitem__)
        return known[node]

    def size(node: fx.Node) -> fx.Node:
        axis = sizes.get(dim_key(node.meta["val"]))
        if axis is None:
            raise _Unfit(Refusal("the output head reads a size that its hidden state does not have", node))
        made = graph.call_function(SIZE_OF, (start, axis))
        made.meta.update(node.meta)
        return made

    return copy
