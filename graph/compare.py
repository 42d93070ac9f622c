"""The one oracle: is this result the right one, element by element, and if not, where and by how much.

Rules (each has planted faults in tests/graph/test_compare.py):

1. Shapes, dtypes, integers and bools are exact. Pure data movement is exact bit for bit, signed zeros
included.
2. Floats are judged per *element*, never by a mean or a cosine: the usual `same()` lets one element of a
   million be off by 0.09, and a cosine of 0.99 lets 15 of 1,000 rows be zero.

       |result - ref64|  <=  max( k * condition * u * row,   m * error of a correct program in that row )

   `ref64` is the float64 run (graph/float64.py), `u` the unit roundoff of the compute dtype, `row` the
   largest |ref64| in the element's row (the last dimension): sums and norms make errors relative to a row,
   not to an element.
3. NaN and infinities are where the eager run has them (without an eager run: where the reference, rounded to
   the result's dtype, has them). The only exceptions are in `NonFiniteException`, and a caller has to name
   them.

The second term makes the bound *adaptive*. No constant k fits both a single multiplication and thirty decoder
layers: k = 2,000 would be right for the latter and blind for the former. So the yardstick is measured:
`eager` (the outputs of the eager run in the same dtype) and/or `spread` (`rounding_spread`, one rounding per
operation). A row's yardstick is the largest error that the correct program makes in it, but at least the
median over rows, because a short row can be right by luck; `m` grows for tiny tensors for the same reason.
Given a yardstick, `k` is the small `floor` of the table, without one the larger `alone`. A useless yardstick
(a wrong eager run) shows as `Comparison.loosest`: the largest bound relative to its row. Not promised: the
sign of a computed zero, NaN payloads.
Source: torch._dynamo.utils.same, whose measured yardstick this keeps and whose means it drops.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchweld.graph.float64 import (
    Outputs,
    is_data_movement,
    reference_float64,
    rounding_spread,
    to_float64,
    unit_roundoff,
)
from torchweld.graph.logits import LogitComparison, compare_logits
from torchweld.graph.snapshot import Snapshot, changed_inputs, inputs_unchanged, snapshot

__all__ = [
    "TOLERANCES",
    "Comparison",
    "LogitComparison",
    "NonFiniteException",
    "OutputComparison",
    "Outputs",
    "Snapshot",
    "Tolerance",
    "changed_inputs",
    "compare",
    "compare_logits",
    "inputs_unchanged",
    "is_data_movement",
    "reference_float64",
    "rounding_spread",
    "snapshot",
    "to_float64",
    "unit_roundoff",
]


@dataclass(frozen=True)
class Tolerance:
    """One line of the tolerance table; `floor` and `alone` count unit roundoffs of the row's largest
    magnitude.

    floor: granted always, when a yardstick is given; covers another summation order and 2-ulp exp, tanh and
    erf.
    alone: granted instead of `floor` when nothing was measured.
    """

    floor: float
    alone: float


#: The one tolerance table. The 16-bit dtypes get few units because fused kernels round less often than eager
#: ones.
TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float64: Tolerance(floor=64.0, alone=1024.0),
        torch.float32: Tolerance(floor=64.0, alone=1024.0),
        torch.float16: Tolerance(floor=4.0, alone=32.0),
        torch.bfloat16: Tolerance(floor=4.0, alone=16.0),
    }
)
#: Another correct program of the same dtype stays within this many times the yardstick,
_YARDSTICK_FACTOR = 6.0
#: and, for a single number, within this many times more: the maximum of one draw is luck.
_FEW_ELEMENTS = 16.0


class NonFiniteException(enum.Enum):
    """The written list of places where NaN or infinity may differ from the eager run."""

    FULLY_MASKED_ATTENTION_ROW = "fully_masked_attention_row"
    """Eager softmax of a row of -inf is NaN, torch's fused attention and ours give a row of zeros."""
    WIDER_INTERMEDIATE = "wider_intermediate"
    """Eager 16-bit intermediates overflowed; the fused kernel kept float32 and is within the bound of
    float64."""


@dataclass(frozen=True)
class OutputComparison:
    """How one output did. Errors are absolute, `max_relative_error` is relative to the row's largest
    magnitude."""

    index: int
    ok: bool
    reason: str
    max_abs: float = 0.0
    max_relative_error: float = 0.0
    rms_relative: float = 0.0
    worst_index: tuple[int, ...] = ()
    worst_over_bound: float = 0.0
    loosest: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """The verdict over all outputs; the numbers are the worst of any output.

    worst_index is (output, *coordinates) of the element that is furthest over, or nearest to, its bound.
    worst_over_bound is error / bound there; loosest is the largest bound / row magnitude that was granted.
    """

    ok: bool
    max_abs: float
    max_relative_error: float
    rms_relative: float
    worst_index: tuple[int, ...]
    worst_over_bound: float
    loosest: float
    outputs: tuple[OutputComparison, ...]
    reasons: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.ok


def compare(
    actual: object,
    reference: object,
    *,
    dtype_of_compute: torch.dtype,
    eager: object | None = None,
    spread: Sequence[object] | None = None,
    data_movement: bool = False,
    condition: float = 1.0,
    exceptions: frozenset[NonFiniteException] = frozenset(),
) -> Comparison:
    """Judge `actual` against `reference`, the float64 run; both are tensors or pytrees of them.

    dtype_of_compute: the dtype in which the program computes (a key of TOLERANCES); an output of a coarser
        dtype is judged by its own.
    eager: outputs of the eager run in that dtype: exact dtype, positions of NaN and infinity, and the
    yardstick.
    spread: per output the result of `rounding_spread`, or None.
    data_movement: the outputs are copies of bits; they must equal `eager`, else the rounded reference, bit
    for bit.
    condition: a known condition number (sum of magnitudes / magnitude of the sum) that widens the first term.
    Raises KeyError for a compute dtype without a line in TOLERANCES. Bad results never raise: they are `not
    ok`.
    """
    got, want = tree_leaves(actual), tree_leaves(reference)
    plain = tree_leaves(eager) if eager is not None else [None] * len(want)
    scatter = list(spread) if spread is not None else [None] * len(want)
    if not len(got) == len(want) == len(plain) == len(scatter):
        return _merge((_refuse(0, f"{len(got)} outputs, expected {len(want)}"),))
    rules = _Rules(dtype_of_compute, TOLERANCES[dtype_of_compute], condition, exceptions)
    outputs: list[OutputComparison] = []
    for i, (mine, ref, own, noise) in enumerate(zip(got, want, plain, scatter, strict=True)):
        if not (isinstance(mine, Tensor) and isinstance(ref, Tensor)):
            same = type(mine) is type(ref) and mine == ref
            outputs.append(_accept(i) if same else _refuse(i, f"value {mine!r}, expected {ref!r}"))
            continue
        yardsticks = [own - ref] if isinstance(own, Tensor) and _is_float_pair(own, ref) else []
        yardsticks += [noise] if isinstance(noise, Tensor) else []
        outputs.append(_compare_tensor(i, mine, ref, own, yardsticks, data_movement, rules))
    return _merge(tuple(outputs))


@dataclass(frozen=True)
class _Rules:
    dtype: torch.dtype
    tolerance: Tolerance
    condition: float
    exceptions: frozenset[NonFiniteException]


def _is_float_pair(own: Tensor, ref: Tensor) -> bool:
    return own.is_floating_point() and ref.is_floating_point() and own.shape == ref.shape


def _compare_tensor(
    index: int,
    actual: Tensor,
    ref: Tensor,
    eager: object,
    yardsticks: Sequence[Tensor],
    data_movement: bool,
    rules: _Rules,
) -> OutputComparison:
    actual, ref = actual.detach(), ref.detach()
    expected = eager.detach() if isinstance(eager, Tensor) else ref
    if actual.shape != ref.shape or actual.shape != expected.shape:
        return _refuse(index, f"shape {tuple(actual.shape)}, expected {tuple(ref.shape)}")
    # A float64 reference says nothing about the narrow dtype, only that it is a float; the eager run says
    # all.
    any_float = expected is ref and actual.is_floating_point() and ref.is_floating_point()
    if actual.dtype != expected.dtype and not any_float:
        return _refuse(index, f"dtype {actual.dtype}, expected {expected.dtype}")
    if actual.numel() == 0:
        return _accept(index)
    if data_movement or not actual.is_floating_point():
        return _compare_bits(index, actual, expected.to(actual.dtype))
    return _compare_floats(index, actual, ref.double(), expected, yardsticks, rules)


def _compare_bits(index: int, actual: Tensor, expected: Tensor) -> OutputComparison:
    """Equality of every bit: integers and bools by value, floats by pattern (-0.0 is not 0.0, a NaN is its
    payload)."""
    wrong = (_bits(actual) != _bits(expected)).reshape(*actual.shape, -1).any(-1)
    count = int(wrong.sum())
    if count == 0:
        return _accept(index)
    where = _coordinates(int(wrong.flatten().int().argmax()), actual.shape)
    gap = (actual.double() - expected.double()).abs().nan_to_num(nan=math.inf).max().item()
    reason = (
        f"{count} of {wrong.numel()} elements differ bitwise, first at {where}: {actual[where].item()!r}, "
    )
    reason = f"output {index}: {reason}expected {expected[where].item()!r}"
    return OutputComparison(index, False, reason, gap, math.inf, math.inf, where, math.inf)


def _compare_floats(
    index: int, actual: Tensor, ref: Tensor, expected: Tensor, yardsticks: Sequence[Tensor], rules: _Rules
) -> OutputComparison:
    row = _row_max(ref)
    bound = _bound(ref, row, actual.dtype, yardsticks, rules)
    granted = (bound / row)[row > 0].max().item() if bool((row > 0).any()) else 0.0
    bound = bound.expand(ref.shape)
    error = (actual.double() - ref).abs()
    excused = _excused(actual, ref, expected, error <= bound, rules.exceptions)
    misplaced = (_class(actual) != _class(expected.to(actual.dtype))) & ~excused
    # Infinity or NaN in the right place has no error; a finite value against a reference that is not has all
    # of it.
    error = torch.where(excused | ~actual.isfinite(), 0.0, error.nan_to_num(nan=math.inf))
    error = torch.where(misplaced, math.inf, error)
    ratio = torch.where(error == 0.0, 0.0, error / bound)
    worst = _coordinates(int(ratio.flatten().argmax()), ratio.shape)
    over = float(ratio[worst])
    norm = _finite(ref).square().mean().sqrt().item()
    rms = error.square().mean().sqrt().item()
    # A row of zeros has no magnitude: its errors are reported relative to the whole tensor.
    relative = (
        (error / torch.where(row > 0, row, row.max().clamp(min=torch.finfo(torch.float64).tiny))).max().item()
    )
    reason = (
        "" if over <= 1.0 else _explain(index, actual, ref, expected, worst, bound, int((ratio > 1.0).sum()))
    )
    return OutputComparison(
        index,
        over <= 1.0,
        reason,
        error.max().item(),
        relative,
        rms / norm if norm else rms,
        worst,
        over,
        granted,
    )


def _bound(
    ref: Tensor, row: Tensor, dtype: torch.dtype, yardsticks: Sequence[Tensor], rules: _Rules
) -> Tensor:
    """Return the granted absolute error per row: float64, the shape of `row`."""
    unit, tolerance = unit_roundoff(rules.dtype), rules.tolerance
    if unit_roundoff(dtype) > unit:
        unit, tolerance = unit_roundoff(dtype), TOLERANCES[dtype]
    k = tolerance.floor if yardsticks else tolerance.alone
    # Below the smallest normal number there is no relative accuracy (and kernels may flush to zero).
    bound = k * rules.condition * unit * row + torch.finfo(dtype).tiny
    factor = _YARDSTICK_FACTOR * (1.0 + _FEW_ELEMENTS / ref.numel())
    for yardstick in yardsticks:
        measured = _row_max(yardstick.double())
        relative = measured[row > 0] / row[row > 0]
        typical = relative.median() if relative.numel() else torch.zeros((), dtype=torch.float64)
        bound = torch.maximum(bound, factor * torch.maximum(measured, typical * row))
    return bound


def _excused(
    actual: Tensor, ref: Tensor, expected: Tensor, within: Tensor, exceptions: frozenset[NonFiniteException]
) -> Tensor:
    excused = torch.zeros_like(within)
    if NonFiniteException.FULLY_MASKED_ATTENTION_ROW in exceptions and actual.dim():
        nan_row = (expected.isnan() | ref.isnan()).all(-1, keepdim=True)
        excused |= nan_row & (actual == 0).all(-1, keepdim=True)
    if NonFiniteException.WIDER_INTERMEDIATE in exceptions:
        excused |= ~expected.isfinite() & ref.isfinite() & actual.isfinite() & within
    return excused


def _row_max(values: Tensor) -> Tensor:
    magnitude = _finite(values).abs()
    return magnitude.amax(-1, keepdim=True) if values.dim() else magnitude


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)


def _class(values: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 +inf, 3 -inf."""
    return values.isnan().int() + 2 * values.isposinf().int() + 3 * values.isneginf().int()


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def _coordinates(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape)) if shape else ()


def _explain(
    index: int,
    actual: Tensor,
    ref: Tensor,
    expected: Tensor,
    worst: tuple[int, ...],
    bound: Tensor,
    count: int,
) -> str:
    mine, right, plain = actual[worst].item(), ref[worst].item(), expected[worst].item()
    return (
        f"output {index}: {count} of {actual.numel()} elements out of bound, worst at {worst}: {mine!r}, "
        f"float64 says {right!r}"
        + ("" if expected is ref else f", eager {plain!r}")
        + f", allowed +-{bound[worst].item():.3g}"
    )


def _accept(index: int) -> OutputComparison:
    return OutputComparison(index, True, "")


def _refuse(index: int, reason: str) -> OutputComparison:
    return OutputComparison(
        index, False, f"output {index}: {reason}", math.inf, math.inf, math.inf, (), math.inf, 0.0
    )


def _merge(outputs: tuple[OutputComparison, ...]) -> Comparison:
    worst = max(outputs, key=lambda o: o.worst_over_bound, default=_accept(0))
    return Comparison(
        ok=all(o.ok for o in outputs),
        max_abs=max((o.max_abs for o in outputs), default=0.0),
        max_relative_error=max((o.max_relative_error for o in outputs), default=0.0),
        rms_relative=max((o.rms_relative for o in outputs), default=0.0),
        worst_index=(worst.index, *worst.worst_index),
        worst_over_bound=worst.worst_over_bound,
        loosest=max((o.loosest for o in outputs), default=0.0),
        outputs=outputs,
        reasons=tuple(o.reason for o in outputs if o.reason),
    )
