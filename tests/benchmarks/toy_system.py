"""Systems for the tests of the parent: one that works, and some that fail in the ways in which peers fail."""

from __future__ import annotations

import os
import time

from benchmarks.workloads import Workload


class Toy:
    """`behaviour`: good, raises, dies, hangs or differs; the first failure comes with `at` ("load", "run")."""

    def __init__(self, behaviour: str = "good", at: str = "run") -> None:
        self.behaviour, self.at = behaviour, at

    def _fail(self, at: str) -> None:
        if at != self.at:
            return
        if self.behaviour == "raises":
            raise RuntimeError("no such instruction\nand more")
        if self.behaviour == "dies":
            os.abort()
        if self.behaviour == "hangs":
            time.sleep(600)

    def load(self, model: str, threads: int) -> str:
        print("a library that talks on standard output")
        self._fail("load")
        return f"toy on {model} with {threads} threads, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"

    def prepare(self, workload: Workload) -> None:
        print('{"ok": "not an answer"}')
        self._fail("prepare")

    def run(self, workload: Workload) -> float:
        self._fail("run")
        return 0.5

    def answer(self) -> list[float] | None:
        return [1.0, -1.0] if self.behaviour == "differs" else [1.0, 2.0]
