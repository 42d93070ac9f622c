"""Matmuls and attention: the operations that a kernel is built around."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from torchweld.graph.index import ONE, ZERO
from torchweld.graph.meaning.context import (
    Index,
    Meaning,
    Rule,
    Unsupported,
    compute_dtype,
    shape_of,
    tensor_of,
)
from torchweld.graph.ops import attention as _attention_op  # noqa: F401  registers torchweld::attention
from torchweld.graph.ops import cached_attention as _cached_op  # noqa: F401  and torchweld::cached_attention
from torchweld.graph.terms import Attend, Contract, Expr, Term, cast, const, op

aten = torch.ops.aten


def _nodes(node: fx.Node, count: int) -> list[fx.Node]:
    operands = [arg for arg in node.args[:count] if isinstance(arg, fx.Node)]
    if len(operands) != count:
        raise Unsupported(f"{node.name}: expected {count} tensors")
    return operands


def _contract(
    meaning: Meaning, node: fx.Node, a: fx.Node, a_index: Index, b: fx.Node, b_index: Index, extent: Expr
) -> Term:
    """sum_k a[..., k, ...] * b[..., k, ...]; None marks the place of k in an index."""
    dtype = compute_dtype(tensor_of(node).dtype)
    if not dtype.is_floating_point:
        raise Unsupported(f"{node.name}: matmul of {dtype}")
    k = meaning.shared_axis("k", extent, (a, a_index))

    def fill(index: Index) -> Index:
        return tuple(k.symbol if entry is None else entry for entry in index)

    return Contract(
        dtype, k, cast(meaning.value(a, fill(a_index)), dtype), cast(meaning.value(b, fill(b_index)), dtype)
    )


def _linear(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    x, weight = _nodes(node, 2)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if len(shape_of(weight)) == 1:
        raise Unsupported(f"{node.name}: linear with a vector weight")
    value = _contract(meaning, node, x, (*index[:-1], None), weight, (index[-1], None), shape_of(weight)[1])
    if isinstance(bias, fx.Node):
        value = op("add", value, cast(meaning.value(bias, (index[-1],)), value.dtype))
    return value


def _batch_index(shape: Index, out_batch: Index, index: Index) -> Index:
    """The batch dimensions of an operand of a broadcasting matmul."""
    own = shape[:-2]
    skip = len(out_batch) - len(own)
    return tuple(
        ZERO if size == ONE and out_batch[skip + d] != ONE else index[skip + d] for d, size in enumerate(own)
    )


def _matmul(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    a, b = _nodes(node, 2)
    a_shape, b_shape = shape_of(a), shape_of(b)
    if len(a_shape) == 1 or len(b_shape) == 1:
        row = () if len(a_shape) == 1 else (index[-1] if len(b_shape) == 1 else index[-2],)
        column = () if len(b_shape) == 1 else (index[-1],)
        batch = index[: len(index) - len(row) - len(column)]
        a_batch = batch[len(batch) - len(a_shape[:-2]) :] if len(a_shape) > 1 else ()
        b_batch = batch[len(batch) - len(b_shape[:-2]) :] if len(b_shape) > 1 else ()
        return _contract(meaning, node, a, (*a_batch, *row, None), b, (*b_batch, None, *column), a_shape[-1])
    out_batch, batch = shape_of(node)[:-2], index[:-2]
    a_batch, b_batch = _batch_index(a_shape, out_batch, batch), _batch_index(b_shape, out_batch, batch)
    return _contract(
        meaning, node, a, (*a_batch, index[-2], None), b, (*b_batch, None, index[-1]), a_shape[-1]
    )


def _add_matmul(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """addmm, baddbmm: beta * c + alpha * (a @ b)."""
    c, a, b = _nodes(node, 3)
    product = _contract(
        meaning, node, a, (*index[:-1], None), b, (*index[:-2], None, index[-1]), shape_of(a)[-1]
    )
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if alpha != 1:
        product = op("mul", product, const(alpha, product.dtype))  # type: ignore[arg-type]
    addend = meaning.operand(c, shape_of(node), index, product.dtype)
    if beta != 1:
        addend = op("mul", addend, const(beta, product.dtype))  # type: ignore[arg-type]
    return op("add", product, addend)


def _attention(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    return _attend(meaning, node, index, None, None, node.args[3:])


def _cached_attention(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    past, path = node.args[3:5]
    if not isinstance(past, fx.Node):
        raise Unsupported(f"{node.name}: expected past as a tensor")
    return _attend(meaning, node, index, past, path if isinstance(path, fx.Node) else None, node.args[5:])


def _attend(
    meaning: Meaning,
    node: fx.Node,
    index: Index,
    past: fx.Node | None,
    path: fx.Node | None,
    rest: Sequence[object],
) -> Term:
    """One element of an attention; `rest` are mask, mask kind, window, scale, soft cap and perhaps sinks."""
    query, key, value = _nodes(node, 3)
    mask, mask_kind, window, scale, soft_cap, *more = rest
    sinks = more[0] if more else node.kwargs.get("sinks")
    assert isinstance(window, int) and isinstance(scale, (int, float)) and isinstance(soft_cap, (int, float))
    b, h, t, f = index
    q_shape, k_shape = shape_of(query), shape_of(key)
    dtype = compute_dtype(tensor_of(node).dtype)
    share = meaning.ranges.floordiv(q_shape[1], k_shape[1])
    group = meaning.ranges.floordiv(h, share)
    s, d = meaning.axis("s", k_shape[2]), meaning.axis("d", q_shape[3])
    steps = None if path is None else meaning.axis("step", q_shape[2])
    visible = None
    if isinstance(mask, fx.Node):
        kind = torch.bool if tensor_of(mask).dtype == torch.bool else dtype
        keys = k_shape[2] if past is None or shape_of(mask)[-1] == ONE else shape_of(mask)[-1]
        visible = meaning.operand(mask, (*q_shape[:3], keys), (b, h, t, s.symbol), kind)
    return Attend(
        dtype, s, d,
        cast(meaning.value(query, (b, h, t, d.symbol)), dtype),
        cast(meaning.value(key, (b, group, s.symbol, d.symbol)), dtype),
        cast(meaning.value(value, (b, group, s.symbol, f)), dtype),
        visible, mask_kind, window, float(scale), float(soft_cap), t, q_shape[2],  # type: ignore[arg-type]
        past=None if past is None else cast(meaning.value(past, (b,)), torch.int64),
        path=None if steps is None else cast(meaning.value(path, (b, t, steps.symbol)), torch.int64),
        steps=steps, share=int(share) if share.is_Integer else 1,
        sinks=cast(meaning.value(sinks, (h,)), dtype) if isinstance(sinks, fx.Node) else None,
    )  # fmt: skip


def _append_rows(meaning: Meaning, node: fx.Node, index: Index) -> Term:
    """Stores of the rows are all that a kernel makes of it (codegen/pieces.py): nothing is computed from the cache."""
    raise Unsupported(
        "rows appended to a cache are written in place, so what reads the cache is another kernel"
    )


CONTRACTIONS: dict[object, Rule] = {
    aten.linear.default: Rule("contract", _linear),
    aten.matmul.default: Rule("contract", _matmul),
    aten.mm.default: Rule("contract", _matmul),
    aten.bmm.default: Rule("contract", _matmul),
    aten.mv.default: Rule("contract", _matmul),
    aten.dot.default: Rule("contract", _matmul),
    aten.addmm.default: Rule("contract", _add_matmul),
    aten.baddbmm.default: Rule("contract", _add_matmul),
    torch.ops.torchweld.attention.default: Rule("attention", _attention),
    torch.ops.torchweld.cached_attention.default: Rule("attention", _cached_attention),
    torch.ops.torchweld.append_rows.default: Rule("pointwise", _append_rows),
}
