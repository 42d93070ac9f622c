"""Why a model could not be captured, in one line that names the user's source."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path

from torchweld.graph.program import TORCH_FOLDER

OWN_FOLDER = str(Path(__file__).resolve().parent)
DATA_DEPENDENT = ("data-dependent", "Data-dependent", "data dependent", "_local_scalar_dense", "unbacked")


class CaptureError(RuntimeError):
    """A model that cannot be captured: what happened, where, what was expected and what to do."""

    def __init__(self, what: str, place: str, expected: str, hint: str) -> None:
        super().__init__(f"{place}: {what}; expected {expected}; {hint}")
        self.what = what
        self.place = place
        self.expected = expected
        self.hint = hint


def is_data_dependent(problem: BaseException) -> bool:
    """Did tracing stop because it needed the value of a tensor?"""
    # Here, where tracing has loaded it anyway: a start that traces nothing does not need it.
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return isinstance(problem, GuardOnDataDependentSymNode) or any(
        word in str(problem) for word in DATA_DEPENDENT
    )


def explain_failure(problem: BaseException, name: str) -> CaptureError:
    """Turn an exception of `torch.export` or of the model under tracing into a `CaptureError`."""
    place = user_place(problem) or name
    message = first_line(problem)
    if is_data_dependent(problem):
        return CaptureError(
            "control flow or a size depends on the values of a tensor",
            place,
            "a graph that is the same for all values",
            "use torch.where or masks instead of `if`, .item(), .tolist() or boolean indexing there",
        )
    return CaptureError(
        f"torch.export cannot trace the model ({type(problem).__name__}: {message})",
        place,
        "a model that torch.export can trace",
        "rewrite this line, or export the model yourself and pass the .pt2 file",
    )


def user_place(problem: BaseException) -> str | None:
    """`file.py:12: code` of the innermost frame outside torch and outside this package, if there is one."""
    found = None
    for frame in traceback.extract_tb(problem.__traceback__):
        file = str(Path(frame.filename).resolve()) if not frame.filename.startswith("<") else frame.filename
        if file.startswith((TORCH_FOLDER, OWN_FOLDER)) or "<frozen" in file or "contextlib" in file:
            continue
        if frame.lineno is not None:
            code = (frame.line or linecache.getline(frame.filename, frame.lineno)).strip()
            found = f"{Path(file).name}:{frame.lineno}: {code}"
    return found


def first_line(problem: BaseException) -> str:
    """The first non-empty line of an exception's message, shortened."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(problem).__name__
