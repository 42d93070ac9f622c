"""Run a C++ compiler: units side by side, then the linker, and check what came out.

Nothing of it is believed: it may hang, crash, claim success and write nothing. What it made is in a private folder
until it is a whole library.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

_LOG_TAIL: Final = 1 << 16
_ELF_MACHINES: Final[Mapping[str, int]] = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "ppc64le": 21}
_FUNCTION: Final = re.compile(r'extern "C" void (\w+)\(')
_PLACE: Final = re.compile(r"^unit\d*\.cpp:(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """Why there is no library.  unit: which one failed (None: the only one, or the linker).  function: at fault."""

    text: str
    unit: int | None = None
    function: str | None = None


def build_library(
    command: Sequence[str], units: Sequence[str], product: Path, log: Path, time_limit: float
) -> Problem | None:
    """Compile `units` into the shared object `product`, in its private folder; what went wrong, if anything did.

    One unit is one call of the compiler; of several each has a process of its own, all at once, and `command` links
    them. `log` gets what the compiler that failed said. time_limit: seconds of each step. Raises OSError.
    """
    folder = product.parent
    if len(units) == 1:
        (folder / "unit.cpp").write_text(units[0])
        (status,) = run([(*command, "-o", product.name, "unit.cpp")], [log], time_limit, folder)
        return _failure(status, log, time_limit, units[0]) or _no_library(product)
    names = [f"unit{number}" for number in range(len(units))]
    for name, unit in zip(names, units, strict=True):
        (folder / f"{name}.cpp").write_text(unit)
    plain = [part for part in command if part != "-shared"]
    commands = [(*plain, "-c", "-o", f"{name}.o", f"{name}.cpp") for name in names]
    logs = [folder / f"{name}.log" for name in names]
    for number, status in enumerate(run(commands, logs, time_limit, folder)):
        if (problem := _failure(status, logs[number], time_limit, units[number])) is not None:
            os.replace(logs[number], log)
            return replace(problem, unit=number)
    link = (*command, "-o", product.name, *(f"{name}.o" for name in names))
    (status,) = run([link], [log], time_limit, folder)
    return _failure(status, log, time_limit, "") or _no_library(product)


def _failure(status: int | None, log: Path, time_limit: float, source: str) -> Problem | None:
    """What went wrong in a call that ended with `status`."""
    text = f"was stopped after {time_limit:g} s" if status is None else _why_failed(status, log)
    return None if text is None else Problem(text, None, function_at_fault(source, tail(log)))


def _no_library(product: Path) -> Problem | None:
    text = why_no_library(product)
    return None if text is None else Problem(text)


def function_at_fault(source: str, log: str) -> str | None:
    """The function of `source` that the compiler complained about, from the lines that it names.

    An error in a template is reported there, with the line that asked for it: the last line of the file is the one.
    """
    lines = [int(place) for place in _PLACE.findall(log)]
    before = "\n".join(source.split("\n")[: max(lines, default=0)])
    names = _FUNCTION.findall(before)
    return names[-1] if names else None


def run(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], time_limit: float, folder: Path
) -> list[int | None]:
    """Run side by side, each in a process group of its own, output to files; exit codes, None for a stopped one.

    On the time limit and on an interrupt all groups are killed. A pipe would not do: a grandchild that holds it open
    would keep us waiting after the kill.
    """
    environment = os.environ | {
        "LC_ALL": "C",
        "TMPDIR": str(folder),
        "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
    }
    end = time.monotonic() + time_limit
    with contextlib.ExitStack() as running:
        processes = []
        for command, log in zip(commands, logs, strict=True):
            output = running.enter_context(open(log, "wb"))
            processes.append(_start(command, output, folder, environment))
            running.callback(_stop, processes[-1])
        return [_wait(process, end) for process in processes]


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the group of a process that still runs. Not reaped yet, so the number names this group and no other."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(
    command: Sequence[str], output: IO[bytes], folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def _why_failed(status: int, log: Path) -> str | None:
    if status == 0:
        return None
    # A driver such as g++ reports the crash of the compiler proper in its log and exits with 1 or 4.
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return f"exited with {status}: {first[:200]}" if first else f"exited with {status} and said nothing"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def why_no_library(path: Path) -> str | None:
    """Why the file is not a whole ELF shared library for this machine, or None if it is.

    A cut file with a good header would be mapped and then kill the process with SIGBUS, so every
    loadable segment must lie inside the file. Source: System V ABI, chapters 4 and 5.
    """
    if not os.path.lexists(path):
        return "reported success and wrote nothing"
    if path.is_symlink() or not path.is_file():
        return "reported success and wrote no plain file"
    data = path.read_bytes()
    if not data:
        return "reported success and wrote an empty file"
    if len(data) < 64 or data[:4] != b"\x7fELF":
        return "reported success and wrote something that is no ELF file"
    if (
        data[4] != struct.calcsize("P") // 4
        or data[4] != 2
        or data[5] != (1 if sys.byteorder == "little" else 2)
    ):
        return "wrote an ELF file of another word size or byte order"
    kind, machine = struct.unpack_from("=HH", data, 16)
    if kind != 3 or machine != _ELF_MACHINES.get(platform.machine(), machine):
        return (
            f"wrote an ELF file of type {kind} for machine {machine}, not a library for {platform.machine()}"
        )
    table = struct.unpack_from("=Q", data, 32)[0]
    entry, count = struct.unpack_from("=HH", data, 54)
    if count == 0 or entry < 56 or table + entry * count > len(data):
        return "wrote an ELF file whose program headers are cut off"
    for at in range(table, table + entry * count, entry):
        segment, _, offset, _, _, size = struct.unpack_from("=IIQQQQ", data, at)
        if segment == 1 and offset + size > len(data):
            return f"wrote an ELF file that is cut off at {len(data)} bytes"
    return None


def tail(log: Path) -> str:
    """The end of a log, "" if there is none."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        return file.read().decode(errors="replace")
    return ""
