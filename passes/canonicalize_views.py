"""One spelling for views that keep all elements: aten.reshape and aten.permute.

before:  view, _unsafe_view, squeeze, unsqueeze, flatten, unflatten; transpose, t, mT, movedim; expand_as,
         broadcast_to; stack([x, x, ...]); repeat_interleave(x, n, dim)
after:   aten.reshape; aten.permute; aten.expand, with chains of reshape (or of permute) merged into one
why:     later passes and the code generator meet two ops instead of twenty, and views of views disappear
legal:   a squeezed size is fixed at 1; every symbolic size of the result can be read from a node
source:  canonicalisation as in MLIR; see docs/decisions
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Final

import sympy
from torch import fx

from torchweld.graph.edit import comes_before
from torchweld.graph.match import (
    argument,
    aten,
    axis_argument,
    dim_key,
    is_call,
    is_tensor,
    rank_of,
    shape_of,
    tensor_of,
)
from torchweld.graph.rewrite import (
    Exactness,
    Refusal,
    Rule,
    RuleSite,
    Spelling,
    Target,
    apply_rule,
    check_rule,
    find_by_rules,
)

NAME: Final = "canonicalize_views"
EXACTNESS: Exactness = "exact"


def read_sizes(graph_module: fx.GraphModule, node: fx.Node, sizes: Sequence[Any]) -> list[Any] | None:
    """`sizes` as arguments of a reshape that stands before `node`: ints, nodes, spellings that read or multiply
    sizes, and -1 for a lone symbolic size or one that cannot be read; None when two cannot be read."""
    symbolic = [size for size in sizes if not isinstance(size, int)]
    if len(symbolic) == 1 and 0 not in sizes:
        return [size if isinstance(size, int) else -1 for size in sizes]
    read = [size if isinstance(size, int) else read_size(graph_module, node, size) for size in sizes]
    if read.count(None) > 1:
        return None
    return [-1 if size is None else size for size in read]


def read_size(graph_module: fx.GraphModule, node: fx.Node, size: Any) -> fx.Node | Spelling | int | None:
    """Something before `node` whose value is `size`: a node that the graph has, a new sym_size of an input, or a
    product of such."""
    readers: Sequence[fx.Node] = graph_module.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    for reader in readers:
        if dim_key(reader.meta["val"]) == size and comes_before(reader, node):
            return reader
    for source in node.all_input_nodes:
        if not is_tensor(source) and dim_key(source.meta["val"]) == size:
            return source
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Mul):
        factors: list[Any] = [read_size(graph_module, node, factor) for factor in size.args]
        if None not in factors:
            product: Spelling = functools.reduce(
                lambda left, right: Spelling(operator.mul, (left, right)), factors
            )
            return product
    # Placeholders first: a size that is read from an intermediate would keep that alive.
    for source in (*graph_module.graph.find_nodes(op="placeholder"), *node.all_input_nodes):
        for axis, candidate in enumerate(shape_of(source) if is_tensor(source) else ()):
            if candidate == size:
                return Spelling(aten.sym_size.int, (source, axis))
    return None


def _as_reshape(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    sizes = read_sizes(graph_module, node, shape_of(node))
    if sizes is None:
        return Refusal("a symbolic size of the result cannot be read from any node", node)
    return Spelling(aten.reshape.default, (node.args[0], sizes))


def _view(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    """A view has size arguments of its own, so no size is ever missing."""
    sizes = read_sizes(graph_module, node, shape_of(node))
    own: Any = node.args[1]
    return Spelling(aten.reshape.default, (node.args[0], list(own) if sizes is None else sizes))


def _squeeze(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axes: Any = node.args[1] if len(node.args) > 1 else range(rank_of(source))
    axes = [axes] if isinstance(axes, int) else axes
    # What squeeze does to a symbolic size depends on its value at run time.
    if any(not isinstance(shape_of(source)[axis], int) for axis in axes):
        return Refusal("a squeezed size is not fixed", node)
    return _as_reshape(graph_module, node)


def _merge_reshape(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    source = node.args[0]
    if not is_call(source, aten.reshape.default):
        return None
    assert isinstance(source, fx.Node)
    sizes: Any = node.args[1]
    return Spelling(aten.reshape.default, (source.args[0], list(sizes)))


def _merge_permute(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    source = node.args[0]
    if not is_call(source, aten.permute.default):
        return None
    assert isinstance(source, fx.Node)
    inner, outer = permutation(source), permutation(node)
    return Spelling(aten.permute.default, (source.args[0], [inner[axis] for axis in outer]))


def permutation(node: fx.Node) -> list[int]:
    """Axes of an aten.permute, counted from the front."""
    axes: Any = node.args[1]
    return [axis % len(axes) for axis in axes]


def _transpose(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    rank = rank_of(node)
    first, second = axis_argument(node, 1, "dim0", rank), axis_argument(node, 2, "dim1", rank)
    axes = list(range(rank))
    axes[first], axes[second] = axes[second], axes[first]
    return Spelling(aten.permute.default, (node.args[0], axes))


def _reverse(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    return Spelling(aten.permute.default, (node.args[0], list(reversed(range(rank_of(node))))))


def _swap_last(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    rank = rank_of(node)
    return Spelling(aten.permute.default, (node.args[0], [*range(rank - 2), rank - 1, rank - 2]))


def _movedim(graph_module: fx.GraphModule, node: fx.Node) -> Spelling:
    rank = rank_of(node)
    given: Any = node.args[1:3]
    source, destination = ([axes] if isinstance(axes, int) else list(axes) for axes in given)
    placed = {to % rank: of % rank for of, to in zip(source, destination, strict=True)}
    rest = iter(axis for axis in range(rank) if axis not in placed.values())
    axes = [placed[axis] if axis in placed else next(rest) for axis in range(rank)]
    return Spelling(aten.permute.default, (node.args[0], axes))


def _expand(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    sizes = _expanded_sizes(graph_module, node)
    if sizes is None:
        return Refusal("a symbolic size of the result cannot be read from any node", node)
    return Spelling(aten.expand.default, (node.args[0], sizes))


def _expanded_sizes(graph_module: fx.GraphModule, node: fx.Node) -> list[Any] | None:
    """The sizes of `node` as arguments of an expand: -1 means "as it is" there, not "what is left"."""
    sizes = read_sizes(graph_module, node, shape_of(node))
    if sizes is None:
        return None
    for axis in [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size == -1]:
        sizes[axis] = read_size(graph_module, node, dim_key(tensor_of(node).shape[axis]))
    return None if None in sizes else sizes


def _stack(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """A stack of the same tensor several times, as models repeat heads."""
    parts: Any = node.args[0]
    source = parts[0]
    if any(part is not source for part in parts) or not isinstance(source, fx.Node):
        return None
    axis = axis_argument(node, 1, "dim", rank_of(node))
    shape = [1 if place == axis else size for place, size in enumerate(shape_of(node))]
    sizes, wide = read_sizes(graph_module, node, shape), _expanded_sizes(graph_module, node)
    if sizes is None or wide is None:
        return Refusal("a symbolic size of the result cannot be read from any node", node)
    return Spelling(aten.expand.default, (Spelling(aten.reshape.default, (source, sizes)), wide))


def _repeat_interleave(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """Every entry so many times along an axis: reshape, expand, reshape."""
    source: Any = node.args[0]
    times = node.args[1]
    axis = argument(node, 2, "dim")
    if not isinstance(times, int) or axis is None:
        return None
    axis %= rank_of(source)
    before, after = shape_of(source)[: axis + 1], shape_of(source)[axis + 1 :]
    shapes = ((*before, 1, *after), (*before, times, *after), shape_of(node))
    narrow, wide, merged = (read_sizes(graph_module, node, shape) for shape in shapes)
    if narrow is None or wide is None or merged is None:
        return Refusal("a symbolic size of the result cannot be read from any node", node)
    for place, size in enumerate(wide):  # -1 means "as it is" to expand
        if isinstance(size, int) and size == -1:
            wide[place] = read_size(graph_module, node, shapes[1][place])
    if None in wide:
        return Refusal("a symbolic size of the result cannot be read from any node", node)
    inserted = Spelling(aten.reshape.default, (source, narrow))
    return Spelling(aten.reshape.default, (Spelling(aten.expand.default, (inserted, wide)), merged))


RULES: Final[dict[Target, Rule]] = {
    aten.reshape.default: _merge_reshape,
    aten.permute.default: _merge_permute,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten._reshape_copy.default), _view),
    **dict.fromkeys(
        (
            aten.unsqueeze.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.view_as.default,
            aten.reshape_as.default,
        ),
        _as_reshape,
    ),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    **dict.fromkeys((aten.transpose.int, aten.swapaxes.default, aten.swapdims.default), _transpose),
    **dict.fromkeys((aten.t.default, aten.numpy_T.default), _reverse),
    aten.mT.default: _swap_last,
    **dict.fromkeys(
        (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist), _movedim
    ),
    aten.stack.default: _stack,
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys((aten.expand_as.default, aten.broadcast_to.default), _expand),
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Nodes with another spelling of a view, and views of views."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Put the canonical view in place of the anchor."""
    apply_rule(graph_module, site, NAME)
