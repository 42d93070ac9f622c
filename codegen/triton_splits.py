"""Split keys (flash decoding): several programs of a Triton attention share the keys of one tile of rows.

The keys are cut by position into splits of a fixed size, and a row's result is that of its splits joined in their
order, whoever computed them.  So its bits depend neither on the number of programs nor on that of rows.

    one program per tile     it takes the splits in their order and joins each to what it has
    `splits` programs        program n takes split n of those that the tile sees, and writes its maximum, sum and mixed
                             values to `states`; the program that is the last to count itself in `arrived` reads all
                             of them, joins them, stores the result, and sets the counter back to 0

A program's writes come before its count for whoever reads the count (a barrier, then an atomic that releases and
acquires), so no second launch is needed.  The host says how many programs there are, from the sizes alone; how many of
them have work is known on the GPU only, where it is read how long the text is.
source: Dao et al., Flash-Decoding for long-context inference, 2023; the join is that of the online softmax
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchweld.codegen.ir import AttentionPart, Schedule
from torchweld.codegen.triton_folds import FoldPrinter
from torchweld.codegen.triton_heads import attend_of
from torchweld.codegen.triton_schedule import padded_features

ENOUGH_TILES = 64
"""With so many tiles every tile has one program; it also bounds the memory of the states."""

SPLIT_NAMES = ("split", "tile", "first_split", "end_split", "count", "is_last", "state_ptr", "state_row")
"""Variables that are printed as they are."""


@dataclass(frozen=True)
class SplitArguments:
    """The kernel's arguments for split keys: how many programs share a tile, and pointers to states and counters."""

    splits: str
    states: str
    arrived: str

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of each, in the order of the arguments."""
        return {self.splits: "i64", self.states: "*fp32", self.arrived: "*i32"}


@dataclass(frozen=True)
class State:
    """The variables of an online softmax: maximum and sum of weights per row, and the weighted sum of the values."""

    top: str
    total: str
    mixed: str

    @property
    def all(self) -> str:
        """As arguments or targets of an assignment."""
        return f"{self.top}, {self.total}, {self.mixed}"


def fresh_state(printer: FoldPrinter, prefix: str = "") -> State:
    """Variables that are not used yet."""
    top, total, mixed = (printer.writer.names.fresh(prefix + name) for name in ("top", "total", "mixed"))
    return State(top, total, mixed)


def state_floats(part: AttentionPart, schedule: Schedule) -> int:
    """Floats of the state of one split of one tile."""
    return schedule.block_rows * (padded_features(part.feature) + 2)


def print_empty(
    printer: FoldPrinter, state: State, schedule: Schedule, features: int, sink: str = ""
) -> None:
    """The state before any key: that of nothing, or of the sink, a score per row whose value is 0."""
    column = f"[{schedule.block_rows}, 1]"
    top, total = f'tl.full({column}, float("-inf"), tl.float32)', f"tl.zeros({column}, tl.float32)"
    if sink:
        top, total = f"{sink} + tl.zeros({column}, tl.float32)", f"tl.full({column}, 1.0, tl.float32)"
    printer.writer.line(f"{state.top} = {top}")
    printer.writer.line(f"{state.total} = {total}")
    printer.writer.line(f"{state.mixed} = tl.zeros([{schedule.block_rows}, {features}], tl.float32)")


def print_splits(
    printer: FoldPrinter,
    part: AttentionPart,
    schedule: Schedule,
    arguments: SplitArguments,
    keys: tuple[str, str],
    print_start: Callable[[State], None],
    print_keys: Callable[[State, str, str], None],
) -> State:
    """The splits that this program takes, and the join; returns the state that the variable `is_last` speaks of.

    keys: the tile's first key and their end.  print_start: the state before any key; print_keys: the keys from one to
    another added to a state.
    """
    writer, features = printer.writer, padded_features(part.feature)
    whole, own, size = fresh_state(printer, "whole_"), fresh_state(printer), schedule.split_keys
    number, splits = writer.names.fresh("number"), arguments.splits
    writer.line(f"first_split = {keys[0]} // {size}" if keys[0] != "0" else "first_split = 0")
    writer.line(f"end_split = tl.cdiv({keys[1]}, {size})")
    writer.line(f"count = tl.minimum(end_split - first_split, {splits})  # programs that have keys")
    print_start(whole)
    if attend_of(part).sinks is not None:  # it counts once: where states are joined
        writer.line(f'{whole.top} = tl.where(count > 1, float("-inf"), {whole.top})')
        writer.line(f"{whole.total} = tl.where(count > 1, 0.0, {whole.total})")
    with printer.captured() as lines:
        print_empty(printer, own, schedule, features)
        begin = f"{number} * {size}"
        begin_key = begin if keys[0] == "0" else f"tl.maximum({begin}, {keys[0]})"
        print_keys(own, begin_key, f"tl.minimum({begin} + {size}, {keys[1]})")
        writer.line(f"{whole.all} = join_states({whole.all}, {own.all})")
    writer.helpers["join_states"] = None
    writer.block(f"for {number} in range(first_split + split, end_split, {splits}):", lines)
    _print_join(printer, schedule, arguments, whole, own, features, print_start)
    return whole


def _print_join(
    printer: FoldPrinter,
    schedule: Schedule,
    arguments: SplitArguments,
    whole: State,
    own: State,
    features: int,
    print_start: Callable[[State], None],
) -> None:
    """Leave the program's state to the last one of its tile, which joins all of them."""
    writer, rows = printer.writer, schedule.block_rows
    room = rows * (features + 2)

    def places(number: str) -> list[str]:
        writer.line(f"state_ptr = {arguments.states} + (tile * {arguments.splits} + {number}) * {room}")
        return [
            f"state_ptr + {rows * features} + state_row",
            f"state_ptr + {rows * (features + 1)} + state_row",
            f"state_ptr + state_row * {features} + tl.arange(0, {features})[None, :]",
        ]

    writer.line("is_last = split == 0")
    with printer.captured() as lines:
        writer.line(f"state_row = tl.arange(0, {rows})[:, None]")
        for place, name in zip(places("split"), (whole.top, whole.total, whole.mixed), strict=True):
            writer.line(f"tl.store({place}, {name})")
        writer.line("tl.debug_barrier()  # all threads have written before one of them counts")
        writer.line(f'is_last = tl.atomic_add({arguments.arrived} + tile, 1, sem="acq_rel") == count - 1')
        with printer.captured() as joined:
            writer.line(f"tl.store({arguments.arrived} + tile, 0)  # for the next launch")
            print_start(whole)
            number = writer.names.fresh("number")
            with printer.captured() as step:
                for place, name in zip(places(number), (own.top, own.total, own.mixed), strict=True):
                    writer.line(f"{name} = tl.load({place})")
                writer.line(f"{whole.all} = join_states({whole.all}, {own.all})")
            writer.block(f"for {number} in range(0, count):", step)
        writer.block("if is_last:", joined)
    writer.block("if (count > 1) & (split < count):", lines)
