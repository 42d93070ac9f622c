"""The reference interpreter: what the kernel IR means, in plain torch and without any blocking.

Every axis of a part owns one dimension of a common *frame*; a value is a tensor of the frame's rank with extent 1 in
the dimensions that it does not depend on.  Index expressions become int64 tensors, loads become gathers, folds become
reductions that keep their dimension.  Nothing is tiled, so a printer that disagrees with this file has tiled wrongly.

Carriers: booleans are bool; integers are held as int64 and wrapped to their dtype after each operation; floats are
held as float32 (float64 for float64 terms, or for all with `precision=torch.float64`) and 16-bit results are rounded
to nearest even.  With `precision=torch.float64` no float is rounded at all: that run is the yardstick for errors.

A value under a `Guard` is evaluated everywhere, with illegal indices pulled into range where the condition is false;
what is read there is thrown away.  Where the condition holds, an index outside its buffer raises IndexError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchweld.codegen.interpreter_keys import KeyDims, number_keys
from torchweld.codegen.interpreter_ops import FOLDS, POINTWISE
from torchweld.codegen.ir import (
    AttentionPart,
    Indirect,
    Kernel,
    MatmulPart,
    Part,
    Store,
    part_axes,
    part_binds,
    part_terms,
)
from torchweld.graph.formats import get_format
from torchweld.graph.index import FloorDiv, Mod, evaluate
from torchweld.graph.terms import (
    Attend,
    Axis,
    Const,
    Contract,
    Decode,
    Expr,
    Fold,
    Guard,
    IndexValue,
    Load,
    Op,
    Ref,
    Term,
    bound_axes,
    free_symbols,
    walk,
)


def interpret(
    kernel: Kernel,
    buffers: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    precision: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run `kernel` on contiguous `buffers` (inputs and weights by name) and return its outputs by name, new tensors.

    What the kernel updates is given by name as well and stays as it is; the updated copy is returned.
    precision: None for the kernel's own dtypes; torch.float64 to compute (and return) every float in float64.
    Raises IndexError for an index outside its buffer, KeyError for a missing buffer or size, ValueError for a buffer
    of another shape or dtype than the kernel declares.
    """
    if precision not in (None, torch.float64):
        raise ValueError(f"interpret: precision must be None or torch.float64, got {precision}")
    _check_buffers(kernel, buffers, sizes)
    outputs: dict[str, Tensor] = {}
    for buffer in kernel.buffers:
        if buffer.role == "output":
            dtype = precision if precision is not None and buffer.dtype.is_floating_point else buffer.dtype
            outputs[buffer.name] = torch.zeros([evaluate(e, sizes) for e in buffer.shape], dtype=dtype)
        elif buffer.role == "update":
            given = buffers[buffer.name]
            wide = precision is not None and buffer.dtype.is_floating_point
            outputs[buffer.name] = given.to(precision if wide else given.dtype, copy=True)
    for part in kernel.parts:
        _PartRun(kernel, part, buffers, sizes, precision).run(outputs)
    return outputs


def _check_buffers(kernel: Kernel, buffers: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    for buffer in kernel.buffers:
        if buffer.role == "output":
            continue
        if buffer.name not in buffers:
            raise KeyError(f"kernel {kernel.name}: no tensor given for its {buffer.role} {buffer.name!r}")
        given, shape = buffers[buffer.name], tuple(evaluate(e, sizes) for e in buffer.shape)
        if tuple(given.shape) != shape or given.dtype != buffer.dtype:
            raise ValueError(
                f"kernel {kernel.name}, {buffer.role} {buffer.name!r}: expected {buffer.dtype} of shape {shape}, "
                f"got {given.dtype} of shape {tuple(given.shape)}"
            )


@dataclass(frozen=True)
class _Scope:
    """What the values of one evaluation depend on: the extents of the axes in scope, and where loads must be legal.

    values: axes that do not count 0, 1, 2, ... but take these values along their dimension.
    """

    extents: Mapping[str, int]
    legal: Tensor | None = None
    values: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class _Keys:
    """The keys of an attention along s: the scope of k and v, that of the mask, and who sees which (None: all do)."""

    slots: _Scope
    positions: _Scope
    visible: Tensor | None


@dataclass
class _PartRun:
    """One evaluation of one part: the frame, the values bound so far, and what was computed already."""

    kernel: Kernel
    part: Part
    buffers: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    precision: torch.dtype | None
    dimension: dict[str, int] = field(default_factory=dict)
    bound: dict[str, Tensor] = field(default_factory=dict)
    indirects: dict[str, Indirect] = field(default_factory=dict)
    memo: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    free: dict[int, frozenset[Expr]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    kept_scopes: list[_Scope] = field(default_factory=list)

    def run(self, outputs: dict[str, Tensor]) -> None:
        """Evaluate the binds in order, then the stores."""
        self.indirects = {str(i.symbol): i for i in self.kernel.indirects}
        axes = part_axes(self.part)
        for axis in axes:
            self.dimension.setdefault(axis.name, len(self.dimension))
        indirect_terms = (t for i in self.kernel.indirects for t in walk(i.term))
        for term in (*part_terms(self.part), *indirect_terms):
            for axis in bound_axes(term):
                self.dimension.setdefault(axis.name, len(self.dimension))
        scope = _Scope({axis.name: evaluate(axis.extent, self.sizes) for axis in axes})
        if 0 in scope.extents.values():
            return  # no store: what leads to one need not be legal
        products = scope
        if isinstance(self.part, MatmulPart) and self.part.choices:
            products = self.enter([self.part.n], scope)
        for bind in part_binds(self.part):
            self.bound[bind.name] = self.value(bind.term, scope if isinstance(bind.term, Fold) else products)
        for store in self.part.stores:
            self.store(store, scope, outputs[store.buffer])

    def store(self, store: Store, scope: _Scope, output: Tensor) -> None:
        """Write one store; every element of the output that it covers is written once."""
        value = self.value(store.value, scope)
        index = [self.index(expr, scope) for expr in store.index]
        extents = [1] * len(self.dimension)
        for name, extent in scope.extents.items():
            extents[self.dimension[name]] = extent
        if 0 in extents:
            return
        index = [i.expand(extents) for i in index]
        self.check_range(store.buffer, store.index, index, output.shape, None)
        output[tuple(index)] = _from_carrier(value, output.dtype).expand(extents)

    # -- indices ----------------------------------------------------------------------------------------------------

    def index(self, expr: Expr, scope: _Scope) -> Tensor:
        """An index expression as an int64 tensor in the frame."""
        if expr.is_Integer:
            return self.scalar(int(expr), torch.int64)
        if expr.is_Symbol:
            return self.symbol(str(expr), scope)
        parts = [self.index(part, scope) for part in expr.args]
        if isinstance(expr, FloorDiv):
            return torch.div(parts[0], parts[1], rounding_mode="floor")
        if isinstance(expr, Mod):
            return torch.remainder(parts[0], parts[1])
        if expr.is_Pow:
            return torch.pow(parts[0], parts[1])
        if expr.func.__name__ not in _INDEX_OPS:
            raise ValueError(
                f"kernel {self.kernel.name}: index expression {expr} holds unknown {expr.func.__name__}"
            )
        combine = _INDEX_OPS[expr.func.__name__]
        total = parts[0]
        for part in parts[1:]:
            total = combine(total, part)
        return total

    def symbol(self, name: str, scope: _Scope) -> Tensor:
        """An axis as a range along its dimension, an indirect as the value of its term, a size as a number."""
        if scope.values is not None and name in scope.values:
            return scope.values[name]
        if name in scope.extents:
            shape = [1] * len(self.dimension)
            shape[self.dimension[name]] = scope.extents[name]
            return torch.arange(scope.extents[name], dtype=torch.int64).reshape(shape)
        if name in self.indirects:
            indirect = self.indirects[name]
            found = self.value(indirect.term, scope)
            bad = (found < 0) | (found >= evaluate(indirect.extent, self.sizes))
            if scope.legal is not None:
                bad = bad & scope.legal
            if bool(bad.any()):
                wrong = int(found.expand_as(bad)[bad][0])
                raise IndexError(
                    f"kernel {self.kernel.name}: index {wrong} is out of range for "
                    f"{evaluate(indirect.extent, self.sizes)} rows"
                )
            return found
        if name in self.sizes:
            return self.scalar(self.sizes[name], torch.int64)
        raise KeyError(f"kernel {self.kernel.name}: no value for size {name!r}")

    def scalar(self, value: float | int | bool, dtype: torch.dtype) -> Tensor:
        """A frame tensor of one element."""
        return torch.full([1] * len(self.dimension), value, dtype=dtype)

    def check_range(
        self,
        buffer: str,
        exprs: Sequence[Expr],
        index: list[Tensor],
        shape: Sequence[int],
        legal: Tensor | None,
    ) -> None:
        """Raise IndexError where an index lies outside `shape` although `legal` (None: everywhere) holds."""
        for expr, at, extent in zip(exprs, index, shape, strict=True):
            bad = (at < 0) | (at >= extent)
            if legal is not None:
                bad = bad & legal
            if bool(bad.any()):
                raise IndexError(
                    f"kernel {self.kernel.name}: index {expr} = {int(at.expand_as(bad)[bad][0])} is outside "
                    f"buffer {buffer!r} of shape {tuple(shape)}"
                )

    # -- terms ------------------------------------------------------------------------------------------------------

    def value(self, term: Term, scope: _Scope) -> Tensor:
        """The carrier of `term` in the frame; computed once per scope that it can tell apart."""
        if id(term) not in self.free:
            free_symbols(term, self.free)
        extents = tuple((n, scope.extents.get(n)) for n in sorted(str(s) for s in self.free[id(term)]))
        key = (id(term), extents, id(scope.legal), id(scope.values))
        if key not in self.memo:
            self.memo[key] = self.compute(term, scope)
        return self.memo[key]

    def compute(self, term: Term, scope: _Scope) -> Tensor:
        """`value` without the memory."""
        match term:
            case Const():
                return self.scalar(term.value, self.carrier(term.dtype))
            case IndexValue():
                return self.index(term.expr, scope).to(self.carrier(term.dtype))
            case Ref():
                return self.bound[term.name]
            case Load():
                return self.load(term, scope)
            case Decode():
                return self.decode(term, scope)
            case Op():
                return self.op(term, scope)
            case Guard():
                return self.guard(term, scope)
            case Fold():
                return self.fold(term, scope)
            case Contract():
                return self.contract(term, scope)
            case Attend():
                return self.attend(term, scope)
        raise TypeError(f"kernel {self.kernel.name}: {type(term).__name__} has no meaning")

    def carrier(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that values of `dtype` are held in."""
        if dtype == torch.bool:
            return dtype
        if not dtype.is_floating_point:
            return torch.int64
        return torch.float64 if torch.float64 in (dtype, self.precision) else torch.float32

    def settle(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A computed value as `dtype` in its carrier: integers wrapped, 16-bit floats rounded."""
        if not dtype.is_floating_point:
            return value.to(dtype).to(self.carrier(dtype))
        if self.precision is None and dtype.itemsize == 2:
            value = value.to(dtype)
        return value.to(self.carrier(dtype))

    def gather(self, name: str, exprs: Sequence[Expr], source: Tensor, scope: _Scope) -> Tensor:
        """The elements of `source` at an index per dimension, in the frame."""
        index = [self.index(expr, scope) for expr in exprs]
        self.check_range(name, exprs, index, source.shape, scope.legal)
        if source.numel() == 0:
            frame = self.scalar(0, torch.int64)
            for i in index:
                frame = frame + i
            return torch.zeros_like(frame, dtype=source.dtype)
        if scope.legal is not None:
            index = [i.clamp(0, extent - 1) for i, extent in zip(index, source.shape, strict=True)]
        if not index:
            return source.reshape([1] * len(self.dimension))
        return source[tuple(index)]

    def load(self, term: Load, scope: _Scope) -> Tensor:
        """One element of a buffer per point of the frame."""
        source = self.buffers[term.buffer]
        return self.gather(term.buffer, term.index, source, scope).to(self.carrier(source.dtype))

    def decode(self, term: Decode, scope: _Scope) -> Tensor:
        """Elements of stored rows; only the rows that are asked for are decoded."""
        source, stored = self.buffers[term.buffer], get_format(term.format)
        columns = source.shape[-1] // stored.block_bytes * stored.block
        numbers = torch.arange(source[..., 0].numel()).reshape(source.shape[:-1])
        rows = self.gather(term.buffer, term.row, numbers, scope)
        wanted, place = torch.unique(rows, return_inverse=True)
        values = stored.decode_rows(source.reshape(-1, source.shape[-1])[wanted], columns)
        column = self.index(term.column, scope)
        self.check_range(term.buffer, [term.column], [column], [columns], scope.legal)
        if values.numel() == 0:
            return torch.zeros_like(place + column, dtype=self.carrier(term.dtype))
        return values[place, column.clamp(0, columns - 1)].to(self.carrier(term.dtype))

    def guard(self, term: Guard, scope: _Scope) -> Tensor:
        """`value` where the condition holds (and only there its loads must be legal), else `other`."""
        condition = self.value(term.condition, scope)
        inside = condition if scope.legal is None else condition & scope.legal
        outside = ~condition if scope.legal is None else ~condition & scope.legal
        self.kept += [inside, outside]  # the memo knows them by identity, so they must stay alive
        value = self.value(term.value, replace(scope, legal=inside))
        other = self.value(term.other, replace(scope, legal=outside))
        return torch.where(condition, value, other)

    def op(self, term: Op, scope: _Scope) -> Tensor:
        """A pointwise operation on carriers."""
        args = [self.value(arg, scope) for arg in term.args]
        if term.name == "cast":
            return self.settle(args[0] != 0 if term.dtype == torch.bool else args[0], term.dtype)
        if term.name == "bitcast":
            bits = _from_carrier(args[0], term.args[0].dtype).view(term.dtype)
            return bits.to(self.carrier(term.dtype))
        return self.settle(POINTWISE[term.name](*args), term.dtype)

    # -- reductions -------------------------------------------------------------------------------------------------

    def enter(self, axes: Sequence[Axis], scope: _Scope) -> _Scope:
        """The scope inside a reduction over `axes`."""
        entered = {a.name: evaluate(a.extent, self.sizes) for a in axes}
        return replace(scope, extents={**scope.extents, **entered})

    def spread(self, value: Tensor, axes: Sequence[Axis], inner: _Scope) -> Tensor:
        """`value` with the full extent along `axes`, also where it does not depend on them."""
        shape = list(value.shape)
        for axis in axes:
            shape[self.dimension[axis.name]] = inner.extents[axis.name]
        return value.expand(shape)

    def fold(self, term: Fold, scope: _Scope) -> Tensor:
        """A reduction over the dimensions of its axes, which become 1."""
        inner = self.enter(term.axes, scope)
        body = self.spread(self.value(term.body, inner), term.axes, inner)
        if term.rank is not None:
            return self.settle(self.ranked(term, body, scope), term.dtype)
        dims = [self.dimension[axis.name] for axis in term.axes]
        kept = [1 if d in dims else extent for d, extent in enumerate(body.shape)]
        if body.numel() == 0:
            return torch.full(kept, _identity(term), dtype=self.carrier(term.dtype))
        others = [d for d in range(body.dim()) if d not in dims]
        flat = body.permute(others + dims).reshape([*(body.shape[d] for d in others), -1])
        return self.settle(FOLDS[term.monoid.kind](flat).reshape(kept), term.dtype)

    def ranked(self, term: Fold, body: Tensor, scope: _Scope) -> Tensor:
        """The entry of a number in descending order along one axis: its value, or its place."""
        assert term.rank is not None
        at = self.dimension[term.axes[0].name]
        # Stable, so of equals the lower place comes first; torch sorts NaN as greater than all numbers.
        values, places = body.sort(dim=at, descending=True, stable=True)
        return torch.take_along_dim(
            values if term.monoid.kind == "max" else places, self.index(term.rank, scope), dim=at
        )

    def product_sum(self, a: Tensor, b: Tensor, axis: Axis, inner: _Scope) -> Tensor:
        """The sum of a * b along `axis`; einsum, so that a large contraction is a matmul and not a huge product."""
        dims = list(range(len(self.dimension)))
        at = self.dimension[axis.name]
        result = torch.einsum(
            self.spread(a, [axis], inner),
            dims,
            self.spread(b, [axis], inner),
            dims,
            [d for d in dims if d != at],
        )
        return result.unsqueeze(at)

    def contract(self, term: Contract, scope: _Scope) -> Tensor:
        """The sum over k of a * b in float32 (float64)."""
        inner = self.enter([term.k], scope)
        carrier = self.carrier(term.dtype)
        a, b = self.value(term.a, inner).to(carrier), self.value(term.b, inner).to(carrier)
        return self.settle(self.product_sum(a, b, term.k, inner), term.dtype)

    def attend(self, term: Attend, scope: _Scope) -> Tensor:
        """Softmax attention for every point of the frame; rows that see nothing give 0."""
        seen = self.plain_keys(term, scope) if term.past is None else self.cached_keys(term, scope)
        inner = self.enter([term.d], seen.slots)
        carrier = self.carrier(torch.float64 if term.q.dtype == torch.float64 else torch.float32)
        q, k = self.value(term.q, inner).to(carrier), self.value(term.k, inner).to(carrier)
        score = self.product_sum(q, k, term.d, inner) * term.scale
        if term.soft_cap > 0:
            score = term.soft_cap * torch.tanh(score / term.soft_cap)
        score = self.spread(score, [term.s], seen.slots)
        if seen.visible is not None:
            score = torch.where(seen.visible, score, float("-inf"))
        if term.mask is not None:
            mask = self.value(term.mask, seen.positions)
            hidden = float("-inf")
            score = torch.where(mask, score, hidden) if mask.dtype == torch.bool else score + mask.to(carrier)
        at = self.dimension[term.s.name]
        if seen.slots.extents[term.s.name] == 0:
            weights = score
        else:
            weights = self.weights(term, score, at, scope)
        v = self.value(term.v, seen.slots).to(carrier)
        if term.past is not None and seen.visible is not None:  # a slot that no query sees may hold anything
            v = torch.where(seen.visible.any(self.key_dims(term).query, keepdim=True), v, 0.0)
        return self.settle(self.product_sum(weights, v, term.s, seen.slots), term.dtype)

    def weights(self, term: Attend, score: Tensor, at: int, scope: _Scope) -> Tensor:
        """The softmax of the scores over dimension `at`; the sink takes part and is cut off."""
        blind = (score == float("-inf")).all(dim=at, keepdim=True)
        count = score.shape[at]
        if term.sinks is not None:
            sink = self.value(term.sinks, scope).to(score.dtype)
            shape = torch.broadcast_shapes(score.narrow(at, 0, 1).shape, sink.shape)  # type: ignore[no-untyped-call]
            wide = (*shape[:at], count, *shape[at + 1 :])
            score = torch.cat([score.expand(wide), sink.expand(shape)], dim=at)
        return torch.softmax(score, dim=at).narrow(at, 0, count).masked_fill(blind, 0.0)

    def plain_keys(self, term: Attend, scope: _Scope) -> _Keys:
        """The keys of an attention over all of s: its last t_extent positions are the queries."""
        keys = self.enter([term.s], scope)
        if term.mask_kind == "none":
            return _Keys(keys, keys, None)
        last: Expr = term.t + term.s.extent - term.t_extent
        key, query = self.symbol(term.s.name, keys), self.index(last, scope)
        visible = key <= query
        if term.mask_kind == "window":
            visible = visible & (key > query - term.window)
        return _Keys(keys, keys, visible)

    def cached_keys(self, term: Attend, scope: _Scope) -> _Keys:
        """The keys of an attention over a cache, old ones first, then the new rows; s numbers them."""
        assert term.past is not None
        past = self.value(term.past, scope)
        rows, capacity = evaluate(term.t_extent, self.sizes), evaluate(term.s.extent, self.sizes)
        count = (int(past.max()) if past.numel() else 0) + rows
        numbered = _Scope({**scope.extents, term.s.name: count}, scope.legal)
        path = None
        if term.path is not None and term.steps is not None:
            along = self.enter([term.steps], scope)
            path = self.spread(self.value(term.path, along), [term.steps], along)
        number, window = self.symbol(term.s.name, numbered), term.window if term.mask_kind == "window" else 0
        query, dims = self.index(term.t, scope), self.key_dims(term)
        keys = number_keys(number, past, query, path, rows, capacity, window, dims)
        legal = keys.visible if scope.legal is None else keys.visible & scope.legal
        slots = replace(numbered, values={term.s.name: keys.slot})
        positions = replace(numbered, legal=legal, values={term.s.name: keys.position})
        self.kept_scopes += [slots, positions]
        return _Keys(slots, positions, keys.visible)

    def key_dims(self, term: Attend) -> KeyDims:
        """The dimensions of the part's first batch axis and queries, and of the term's own axes."""
        assert isinstance(self.part, AttentionPart)
        step = -1 if term.steps is None else self.dimension[term.steps.name]
        batch, query, key = (axis.name for axis in (self.part.batch[0], self.part.t, term.s))
        return KeyDims(self.dimension[batch], self.dimension[query], self.dimension[key], step)


_INDEX_OPS: Mapping[str, Callable[..., Tensor]] = {
    "Add": torch.add, "Mul": torch.mul, "Max": torch.maximum, "Min": torch.minimum,
}  # fmt: skip


def _from_carrier(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value != 0) if dtype == torch.bool else value.to(dtype)


def _identity(fold: Fold) -> float | int | bool:
    """What a fold over nothing gives."""
    match fold.monoid.kind:
        case "sum" | "any" | "argmax" | "argmin":
            return 0
        case "prod" | "all":
            return 1
        case "max":
            return float("-inf") if fold.dtype.is_floating_point else torch.iinfo(fold.dtype).min
        case "min":
            return float("inf") if fold.dtype.is_floating_point else torch.iinfo(fold.dtype).max
