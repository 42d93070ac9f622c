"""One spelling for taking a part along one axis: aten.slice with a normal start, or aten.select.

before:  a, b = split(x, n, dim) (also chunk, split_with_sizes, tensor_split, unbind); narrow; x[..., -4:];
         x[:, [2, 3]]
after:   a = slice(x, dim, 0, n); b = slice(x, dim, n, 2n); unbind pieces are select
why:     a tuple value would need its own case in every later pass, and a part is only a view
legal:   pieces have fixed sizes; the pieces are read through getitem; a list of indices is constant and
         contiguous
source:  canonicalisation as in MLIR
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    MAX_INDEX,
    argument,
    aten,
    axis_argument,
    constant_tensor,
    is_tensor,
    rank_of,
    shape_of,
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
    respell,
)

NAME: Final = "canonicalize_slices"
EXACTNESS: Exactness = "exact"

SPLITS: Final = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
    aten.unbind.int,
)


def _slice(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | None:
    """Bounds counted from the front, "to the end" as MAX_INDEX; None if it is that already or cannot be."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axis = axis_argument(node, 1, "dim", rank_of(source))
    start, end, step = (
        argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step"))
    )
    size = shape_of(source)[axis]
    start, end = _bound(0 if start is None else start, size), _bound(MAX_INDEX if end is None else end, size)
    if isinstance(end, int) and isinstance(size, int) and end >= size:
        end = MAX_INDEX
    args = (source, axis, start, end) if step in (None, 1) else (source, axis, start, end, step)
    return None if args == node.args and not node.kwargs else Spelling(aten.slice.Tensor, args)


def _bound(bound: Any, size: Any) -> Any:
    """A negative bound counted from the front where the size is fixed."""
    if isinstance(bound, int) and isinstance(size, int) and bound < 0:
        return max(bound + size, 0)
    return bound


def _narrow(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal:
    source, axis, start, length = node.args
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0):
        return Refusal("start or length of narrow is not fixed", node)
    return Spelling(aten.slice.Tensor, (source, axis, start, start + length))


def _index(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """x[:, :, constant list] as a slice."""
    source: Any = node.args[0]
    indices: Any = node.args[1]
    given = [axis for axis, index in enumerate(indices) if index is not None]
    positions = constant_tensor(graph_module, indices[given[0]]) if len(given) == 1 else None
    if positions is None or positions.dim() != 1 or positions.dtype == torch.bool or positions.numel() == 0:
        return None
    size = shape_of(source)[given[0]]
    if not isinstance(size, int):
        return Refusal("indices into an axis whose size is not fixed", node)
    rows = [int(position) % size for position in positions.tolist()]
    if rows != list(range(rows[0], rows[0] + len(rows))):
        return Refusal("constant indices are not contiguous", node)
    return Spelling(aten.slice.Tensor, (source, given[0], rows[0], rows[0] + len(rows)))


def _split(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | Refusal | None:
    """Refusal, or a placeholder spelling: pieces are cut by `rewrite`, because a split is no single value."""
    if any(user.target is not operator.getitem for user in node.users):
        return Refusal("the pieces are used as a tuple", node)
    if node.target is not aten.unbind.int and piece_bounds(node) is None:
        return Refusal("a piece has no fixed size", node)
    return Spelling(operator.getitem, (node,))


def piece_bounds(node: fx.Node) -> list[tuple[int, int]] | None:
    """(start, end) of each piece of a split; the last one may run to the end; None if another size is not
    fixed."""
    source: Any = node.args[0]
    axis = _split_axis(node, rank_of(source))
    bounds: list[tuple[int, int]] = []
    start = 0
    pieces: Sequence[torch.Tensor] = node.meta["val"]
    for place, piece in enumerate(pieces):
        size = piece.shape[axis]
        if not isinstance(size, int):
            if place != len(pieces) - 1:
                return None
            bounds.append((start, MAX_INDEX))
            continue
        bounds.append((start, start + size))
        start += size
    return bounds


def _split_axis(node: fx.Node, rank: int) -> int:
    return axis_argument(node, 1 if node.target is aten.unbind.int else 2, "dim", rank)


RULES: Final[dict[Target, Rule]] = {
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.index.Tensor: _index,
    **dict.fromkeys(SPLITS, _split),
}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Splits, and slices in another spelling."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Cut every piece that is read directly from the source."""
    if site.anchor.target not in SPLITS:
        apply_rule(graph_module, site, NAME)
        return
    source: Any = site.anchor.args[0]
    assert is_tensor(source)
    axis = _split_axis(site.anchor, rank_of(source))
    bounds = None if site.anchor.target is aten.unbind.int else piece_bounds(site.anchor)
    for item in list(site.anchor.users):
        place: Any = item.args[1]
        if bounds is None:
            target: Target = aten.select.int
            args: tuple[Any, ...] = (source, axis, place)
        else:
            start, end = bounds[place]
            target, args = aten.slice.Tensor, (source, axis, start, end)
        respell(item, Spelling(target, args), NAME)
