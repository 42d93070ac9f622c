"""The process of one system: reads requests from its standard input, answers on its standard output, a line each.

    {"do": "load", "model": "smollm2", "threads": 2}      ->  {"ok": "llama-cpp-python 0.3.36, ..."}
    {"do": "run", "workload": {...}}                      ->  {"ok": 0.123}   or   {"error": "..."}

Libraries print to standard output as they like; that goes to standard error, the answers have a pipe of their own.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Final, Protocol, TextIO, cast

from benchmarks.measure import one_line
from benchmarks.peers.systems import System
from benchmarks.workloads import Workload

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class _Make(Protocol):
    def __call__(self, **settings: str) -> System: ...


def serve(place: str, settings: Mapping[str, str], requests: TextIO, answers: TextIO) -> None:
    """Make the system and answer requests until the input ends."""
    system: System | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if system is None:
                system = make_system(place, settings)
            reply: dict[str, object] = {"ok": handle(system, request)}
        except Exception as error:  # whatever a peer raises is a line in the table
            traceback.print_exc()
            reply = {"error": one_line(error)}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def make_system(place: str, settings: Mapping[str, str]) -> System:
    """The system of `module:Class`."""
    module, _, name = place.partition(":")
    return cast(_Make, getattr(import_module(module), name))(**settings)


def handle(system: System, request: Mapping[str, object]) -> object:
    """One request. ValueError for an unknown one."""
    what = request.get("do")
    if what == "load":
        return system.load(str(request["model"]), int(str(request["threads"])))
    if what == "answer":
        return system.answer()
    workload = Workload(**cast("dict[str, int]", request["workload"]))  # type: ignore[arg-type]
    if what == "prepare":
        system.prepare(workload)
        return None
    if what == "run":
        return system.run(workload)
    raise ValueError(f"unknown request {what!r}: expected load, answer, prepare or run")


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that ends: a stopped one would stay for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


def main() -> None:
    """`python -m benchmarks.peers.worker MODULE:CLASS SETTINGS-AS-JSON`."""
    end_with_parent()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, answers)


if __name__ == "__main__":
    main()
