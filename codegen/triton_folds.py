"""Reductions as Triton source.

A fold takes the columns of the frame if its body does not need them: one padded tile where the width is known and
small, else a loop over column blocks that combines lane by lane and reduces the lanes once at the end.  A fold
inside something that holds the columns already becomes a serial loop.  Masked lanes hold the fold's identity.

argmax and argmin keep the best value and its index per lane; a lane starts with its own number as index, so that
of equal values (also when all are the identity) the lowest index wins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchweld.codegen.triton_frame import Dim, Frame, Group
from torchweld.codegen.triton_schedule import column_block, is_single_tile, is_whole_blocks, width
from torchweld.codegen.triton_terms import TermPrinter
from torchweld.codegen.triton_text import Value, carrier_name
from torchweld.graph.terms import Axis, Const, Decode, Fold, Guard, Load, Op, Term

_ZERO_TO_ZERO = frozenset(
    {"neg", "abs", "sqrt", "cast", "relu", "floor", "ceil", "round", "trunc", "sin", "mul", "add", "sub"}
)
_COMBINE = {
    "sum": "{p} + {q}",
    "prod": "{p} * {q}",
    "any": "{p} | {q}",
    "all": "{p} & {q}",
    "max": "tl.where(({q} > {p}) | ({q} != {q}), {q}, {p})",
    "min": "tl.where(({q} < {p}) | ({q} != {q}), {q}, {p})",
}


def is_search(term: Fold) -> bool:
    """argmax or argmin."""
    return term.monoid.kind in ("argmax", "argmin")


def state_dtype(term: Fold) -> torch.dtype:
    """The dtype that the fold compares or adds in."""
    if term.monoid.kind in ("any", "all"):
        return torch.int32
    if is_search(term):
        return torch.int32 if term.body.dtype == torch.bool else term.body.dtype
    return term.dtype


def identity_text(term: Fold) -> str:
    """What a masked lane of the fold's body holds."""
    dtype = state_dtype(term)
    kind = term.monoid.kind.removeprefix("arg")
    if kind in ("sum", "prod", "any", "all"):
        number = int(kind in ("prod", "all"))
        return str(float(number) if dtype.is_floating_point else number)
    if dtype.is_floating_point:
        return 'float("-inf")' if kind == "max" else 'float("inf")'
    limits = torch.iinfo(dtype)
    return str(limits.min if kind == "max" else limits.max)


@dataclass(frozen=True)
class Lanes:
    """What is left to reduce: one value per lane along the columns `dim`, for a search with an index each."""

    value: Value
    dim: str
    index: Value


class FoldPrinter(TermPrinter):
    """Adds reductions to the terms."""

    def fold(self, term: Fold) -> Value:
        """A reduction over its axes, which are flattened."""
        needed = self.dims_of(term).union(*(g.dims for g in self.guards))
        column = self.frame.column()
        if self.has_row_vectors() or (column is not None and column in needed):
            return self.serial_fold(term)
        with self.within(self.frame.without_column()):
            lanes = self.tile_lanes(term) if is_single_tile(term.axes) else self.loop_lanes(term)
            if is_search(term):
                return self.find(term, lanes)
            return self.reduce(term.monoid.kind, state_dtype(term), lanes.value, lanes.dim)

    def has_row_vectors(self) -> bool:
        """Whether a frame of rank 1 has rows in its only dimension: then there are no columns to take."""
        return self.frame.rank == 1 and any(dim.place == 0 for dim in self.frame.dims.values())

    def columns(self, axes: tuple[Axis, ...], start: str = "") -> tuple[Frame, Value, str]:
        """The frame with `axes` along the columns, the column index, and the name of its dimension."""
        block, extent = column_block(axes), self.index(width(axes))
        text = f"tl.arange(0, {block})"
        text = f"{start} + {text}" if start else text
        if self.frame.rank == 2:
            text = f"({text})[None, :]" if start else f"{text}[None, :]"
        name = f"{extent.text}/{start}"
        flat = "_".join(axis.name for axis in axes)
        column = self.writer.let(flat, Value(text, frozenset({name})))
        mask = None if is_whole_blocks(axes, block) else f"{column.text} < {extent.operand}"
        return self.frame.with_group(Group(axes, column), **{name: Dim(1, block, mask)}), column, name

    def state(self, term: Fold, value: Value) -> Value:
        """A body value in the dtype of the fold's state."""
        source, target = term.body.dtype, state_dtype(term)
        if term.monoid.kind in ("any", "all"):
            value, source = self.cast(value, source, torch.bool), torch.bool
        if carrier_name(source) == carrier_name(target):
            return value
        return self.cast(value, source, target)

    # -- tiles ----------------------------------------------------------------------------------------------

    def tile_lanes(self, term: Fold) -> Lanes:
        """The whole row in one tile."""
        frame, column, dim = self.columns(term.axes)
        with self.within(frame):
            return Lanes(self.body_value(term, column, dim), dim, column)

    def body_value(self, term: Fold, column: Value, dim: str) -> Value:
        """The fold's body over a tile, masked lanes holding the identity."""
        body, identity, mask = term.body, identity_text(term), self.frame.dims[dim].mask
        value = self.state(term, self.term(body))
        if dim not in value.dims:
            here = mask or f"{column.text} >= 0"
            return Value(f"tl.where({here}, {value.text}, {identity})", value.dims | {dim})
        if mask is None or (term.monoid.kind == "sum" and self.is_zero_when_masked(body, dim)):
            return value
        return Value(f"tl.where({mask}, {value.text}, {identity})", value.dims)

    def is_zero_when_masked(self, term: Term, dim: str) -> bool:
        """Proof that a lane whose loads along `dim` are masked to 0 has the value 0."""
        match term:
            case Const():
                return term.value == 0
            case Load() | Decode():
                return dim in self.dims_of(term)
            case Op():
                is_kept = term.name in _ZERO_TO_ZERO
                return is_kept and all(self.is_zero_when_masked(arg, dim) for arg in term.args)
            case Guard():
                return self.is_zero_when_masked(term.value, dim) and self.is_zero_when_masked(term.other, dim)
        return False

    # -- from lanes to one value ----------------------------------------------------------------------------

    def reduce(self, kind: str, dtype: torch.dtype, value: Value, dim: str) -> Value:
        """The lanes along the columns combined; NaN wins over every number in max and min."""
        is_flat = self.frame.rank == 1
        where = "axis=0, keep_dims=False" if is_flat else "axis=1, keep_dims=True"
        short = "axis=0" if is_flat else where
        dims = value.dims - {dim}
        match kind:
            case "prod":
                self.writer.helpers["multiply"] = None
                return Value(
                    f"tl.reduce({value.text}, {int(not is_flat)}, multiply, keep_dims={not is_flat})", dims
                )
            case "any" | "all":
                function = "max" if kind == "any" else "min"
                return Value(f"(tl.{function}({value.text}, {short}) != 0)", dims)
            case "max" | "min" if dtype.is_floating_point:
                self.writer.helpers[f"{kind}_with_nan"] = None
                return Value(f"{kind}_with_nan({value.text}, {where})", dims)
        text = f"tl.{kind}({value.text}, {short})"
        is_narrow = dtype.itemsize < 4 and not dtype.is_floating_point
        return Value(f"{text}.to({carrier_name(dtype)})" if is_narrow else text, dims)

    def find(self, term: Fold, lanes: Lanes) -> Value:
        """The lowest index among the lanes that hold the best value."""
        dtype = state_dtype(term)
        value = self.writer.let("candidates", lanes.value)
        best = self.reduce(term.monoid.kind.removeprefix("arg"), dtype, value, lanes.dim)
        best = self.writer.let("best", best)
        hit = f"{value.text} == {best.text}"
        if dtype.is_floating_point:
            hit = f"({hit}) | ({value.text} != {value.text})"  # if a lane is NaN, so is the best
        short = "axis=0" if self.frame.rank == 1 else "axis=1, keep_dims=True"
        index = f"tl.min(tl.where({hit}, {lanes.index.text}, 2147483647), {short})"
        return Value(f"{index}.to({carrier_name(term.dtype)})", best.dims)

    # -- loops ----------------------------------------------------------------------------------------------

    def loop_lanes(self, term: Fold) -> Lanes:
        """A row in column blocks, combined lane by lane."""
        start = self.writer.names.fresh("start")
        block, extent = column_block(term.axes), self.index(width(term.axes))
        with self.captured() as lines:
            frame, column, dim = self.columns(term.axes, start)
            with self.within(frame):
                value = self.body_value(term, column, dim)
                shape, index_shape = frame.shape(value.dims), frame.shape(frozenset({dim}))
            names = self.combine_into(term, value, column)
        lane = f"tl.arange(0, {block})"
        lane = lane if self.frame.rank == 1 else f"{lane}[None, :]"
        if shape != index_shape:
            lane = f"tl.broadcast_to({lane}, {shape})"
        self.start_loop(term, names, shape, lane)
        self.writer.block(f"for {start} in range(0, {extent.text}, {block}):", lines)
        return Lanes(Value(names[0], value.dims), dim, Value(names[-1], value.dims))

    def serial_fold(self, term: Fold) -> Value:
        """One step per element, where the tile's columns are taken."""
        step, extent = self.writer.names.fresh(term.axes[0].name), self.index(width(term.axes))
        with self.captured() as lines, self.within(self.frame.with_group(Group(term.axes, Value(step)))):
            value = self.state(term, self.term(term.body))
            shape = self.frame.shape(value.dims)
            names = self.combine_into(term, value, Value(step))
        self.start_loop(term, names, shape, f"tl.zeros({shape}, tl.int32)")
        self.writer.block(f"for {step} in range(0, {extent.text}):", lines)
        result = Value(names[-1], value.dims)
        if is_search(term):
            return self.cast(result, torch.int32, term.dtype)
        return self.cast(result, state_dtype(term), term.dtype)

    def combine_into(self, term: Fold, value: Value, index: Value) -> list[str]:
        """The statements that take one block into the state; returns the state's variables, to be started."""
        state = self.writer.names.fresh("champion" if is_search(term) else "partial")
        value = self.writer.let("value", value)
        if not is_search(term):
            self.writer.line(f"{state} = {_COMBINE[term.monoid.kind].format(p=state, q=value.operand)}")
            return [state]
        place = self.writer.names.fresh("champion_index")
        better = f"{value.text} {'>' if term.monoid.kind == 'argmax' else '<'} {state}"
        if state_dtype(term).is_floating_point:
            better = f"({better}) | (({value.text} != {value.text}) & ({state} == {state}))"
        better = self.writer.assign("better", Value(better)).text
        self.writer.line(f"{place} = tl.where({better}, {index.text}, {place}).to(tl.int32)")
        self.writer.line(f"{state} = tl.where({better}, {value.text}, {state})")
        return [state, place]

    def start_loop(self, term: Fold, names: list[str], shape: str, index: str) -> None:
        """The state's variables before the first step."""
        dtype = carrier_name(state_dtype(term))
        self.writer.line(f"{names[0]} = tl.full({shape}, {identity_text(term)}, {dtype})")
        if len(names) > 1:
            self.writer.line(f"{names[1]} = {index}")
