"""Turn any exception into one line and an exit code: nobody who uses the command line sees a traceback.

Exit codes: 1 the answer is no (a check failed), 2 bad input or surroundings, 3 a fault of our own. Needs no
torch: an error on the way there must be explained, too.
"""

from __future__ import annotations

import errno
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BAD_INPUT: Final = 2
OUR_FAULT: Final = 3
INTERRUPTED: Final = 130

_LONGEST_LINE: Final = 600
# torch has no exception type for these; the words are those of torch 2.13.
_DEVICE_WORDS: Final = (
    "not compiled with CUDA",
    "No CUDA GPUs are available",
    "no NVIDIA driver",
    "No HIP GPUs",
    "not linked with support for",
    "Cannot access accelerator device",
    "invalid device ordinal",
    "device type at start of device string",
    "Attempting to deserialize object on",
)
_MEMORY_WORDS: Final = ("not enough memory", "can't allocate memory", "out of memory")


@dataclass(frozen=True)
class Failure:
    """What to print, on one line, and the exit code."""

    line: str
    code: int


def explain(problem: BaseException) -> Failure:
    """The line and exit code for `problem`, whatever it is.

    Exceptions of our own classes are written for users and shown as they are; known ones of Python and torch
    are reworded; anything else is a fault of ours, and the line says how to see the traceback.
    """
    if isinstance(problem, KeyboardInterrupt):
        return Failure("interrupted", INTERRUPTED)
    text = one_line(str(problem))
    if isinstance(problem, OSError):
        return Failure(text if _is_ours(problem) else _explain_os(problem), BAD_INPUT)
    if _is_ours(problem):
        return Failure(text, BAD_INPUT)
    if any(word in text for word in _DEVICE_WORDS):
        hint = "move the model to a device of this machine, such as cpu"
        return Failure(f"a device that is not there: {text}; {hint}", BAD_INPUT)
    if isinstance(problem, MemoryError) or any(word in text for word in _MEMORY_WORDS):
        return Failure(f"not enough memory ({text}); try a smaller --batch or --seq", BAD_INPUT)
    hint = "please report it; TORCHWELD_LOGS=+optimizer prints the traceback"
    return Failure(f"internal error {type(problem).__name__}{_place(problem)}: {text}; {hint}", OUR_FAULT)


def one_line(text: str) -> str:
    """`text` with all white space folded into single blanks, shortened to what a reader reads."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 3] + "..."


def _is_ours(problem: BaseException) -> bool:
    return type(problem).__module__.partition(".")[0] == "torchweld"


def _explain_os(problem: OSError) -> str:
    place = f"{problem.filename}: " if problem.filename else ""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or set TORCHWELD_CACHE_DIR and --out to another disk"
        return one_line(f"{place}the disk is full; {hint}")
    return one_line(f"{place}{problem.strerror or problem}")


def _place(problem: BaseException) -> str:
    frames = traceback.extract_tb(problem.__traceback__)
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
