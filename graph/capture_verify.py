"""A capture is believed only after it has equalled the model at sizes other than the traced one.

torch.export can succeed and still fix a Python number that depended on the size (a table built for one
length, a branch on the batch). Sizes here are tiny: the check costs two forward passes of a few rows, and of
stored weights few rows are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.utils._pytree as pytree
from torch import nn

from torchweld.graph.capture_errors import first_line
from torchweld.graph.capture_few_rows import FewRows
from torchweld.graph.capture_inputs import Example, Family, Role
from torchweld.graph.program import Program

Model = nn.Module | Callable[..., object]

SECOND_SIZES: Mapping[Role, int] = {"batch": 2, "sequence": 5, "other": 3}
# The same kernels run on both sides, so only the order of a few sums may differ.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

PIECE = 1 << 18  # elements compared at a time, in float64: logits are the largest tensors that a check makes


@dataclass(frozen=True)
class VerifyReport:
    """`culprits`: families of dimensions at which the program is wrong, and how; `failure`: wrong at the
    user's own size; `works_at_one`: batch and sequence may also be 1."""

    culprits: Mapping[Family, str] = field(default_factory=dict)
    failure: str | None = None
    works_at_one: bool = False


def find_differences(
    program: Program, model: Model, example: Example, families: Collection[Family]
) -> VerifyReport:
    """Run the program and the model at other sizes, all `families` changed at once, then one by one on a
    failure.

    First with few rows of every stored weight, which is all where nothing is found."""
    with FewRows() as rows:
        report = _find_differences(program, model, example, families)
    if not rows.used or not (report.culprits or report.failure or (families and not report.works_at_one)):
        return report
    return _find_differences(program, model, example, families)


def _find_differences(
    program: Program, model: Model, example: Example, families: Collection[Family]
) -> VerifyReport:
    lows = {(s.input, s.dim): s for s in program.sizes}

    def second(family: Family) -> int:
        ranges = [lows[example.names[a.leaf], a.dim] for a in example.axes if a.family == family]
        high = min((r.high for r in ranges if r.high is not None), default=SECOND_SIZES[family[0]])
        size = max(SECOND_SIZES[family[0]], *(r.low for r in ranges), 1)
        return min(size, max(high, 1))

    sizes = {family: second(family) for family in families}
    try:
        problem = difference_at(program, model, example, sizes)
    except SizeRefused as refusal:
        problem = str(refusal)
    if problem is None:
        ones = dict.fromkeys(families, 1)
        return VerifyReport(works_at_one=bool(ones) and _works_at(program, model, example, ones))
    culprits = _culprits(program, model, example, sizes)
    if not culprits and families and _works_at(program, model, example, {}):
        culprits = dict.fromkeys(families, problem)
    return VerifyReport(culprits=culprits, failure=None if culprits else problem)


def _works_at(program: Program, model: Model, example: Example, sizes: Mapping[Family, int]) -> bool:
    try:
        return difference_at(program, model, example, sizes) is None
    except SizeRefused:
        return False


def _culprits(
    program: Program, model: Model, example: Example, sizes: Mapping[Family, int]
) -> dict[Family, str]:
    """The families that are wrong when they alone change, and why."""
    culprits = {}
    for family, size in sizes.items():
        try:
            problem = difference_at(program, model, example, {family: size})
        except SizeRefused as refusal:
            problem = str(refusal)
        if problem is not None:
            culprits[family] = problem
    return culprits


class SizeRefused(Exception):
    """The model itself does not run at a size."""


def difference_at(
    program: Program, model: Model, example: Example, sizes: Mapping[Family, int]
) -> str | None:
    """How the program differs from the model when the families have these sizes; None when it does not.

    Raises `SizeRefused` when the model itself fails at these sizes."""
    where = ", ".join(f"{role} {size}" for (role, _), size in sizes.items()) or "the example's size"
    args, kwargs = pytree.tree_unflatten(list(example.resized(sizes)), example.spec)
    try:
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*args, **kwargs))
    except Exception as problem:
        raise SizeRefused(f"the model fails at {where} ({first_line(problem)})") from problem
    try:
        with torch.no_grad():
            actual = program.graph_module(*example.resized(sizes))
    except Exception as problem:
        return f"the captured program fails at {where} ({first_line(problem)})"
    for number, (left, right) in enumerate(zip(actual, expected, strict=True)):
        if (text := _leaf_difference(left, right)) is not None:
            return f"output {number} of the captured program {text} at {where}"
    return None


def _leaf_difference(actual: object, expected: object) -> str | None:
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        same = isinstance(expected, torch.Tensor) == isinstance(actual, torch.Tensor) and actual == expected
        return None if same else f"is {actual!r}, not {expected!r}"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"has shape {tuple(actual.shape)} {actual.dtype}, not {tuple(expected.shape)} {expected.dtype}"
    if expected.dtype not in TOLERANCE or not expected.numel():
        return None if torch.equal(actual, expected) else "has other values"
    finite = expected.isfinite()
    left, right = actual, expected
    if not bool(finite.all()):  # an index of what is finite takes more memory than all of it
        if not torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()):
            return "differs where the model gives NaN or infinity"
        left, right = actual[finite], expected[finite]
    if not right.numel():
        return None
    size = float(torch.linalg.vector_norm(right, dtype=torch.float64)) / right.numel() ** 0.5
    pieces = zip(torch.split(left.reshape(-1), PIECE), torch.split(right.reshape(-1), PIECE), strict=True)
    errors = [_piece_error(left, right, size) for left, right in pieces]
    greatest, worst = torch.tensor(errors).amax(0).tolist()  # NaN, where there is one
    return None if worst <= 0 else f"differs by up to {greatest:.3g}"


def _piece_error(actual: torch.Tensor, expected: torch.Tensor, size: float) -> tuple[float, float]:
    """The greatest error of a piece of an output, and by how much one exceeds its bound; size: of the whole."""
    error = actual.double().sub_(expected).abs_()
    bound = expected.double().abs_().add_(size).mul_(TOLERANCE[expected.dtype])
    return float(error.max()), float(error.sub_(bound).max())
