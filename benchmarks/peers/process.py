"""A system in a process of its own, as the parent sees it: asked over a pipe, stopped while it is not its turn.

Thread pools of different libraries in one process disturb each other, and idle OpenMP threads spin. So every system
has a process, and all but the one whose turn it is are stopped (SIGSTOP): a stopped process cannot spin.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

from benchmarks.peers.systems import SystemSpec
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]


class SystemFailed(RuntimeError):
    """A system that cannot go on: raised an error, ended, or did not answer in time."""


class SystemProcess:
    """One worker. `ask` raises SystemFailed; `close` ends it in any case. `log`: what it printed."""

    def __init__(self, spec: SystemSpec, threads: int, log: IO[bytes]) -> None:
        self.spec = spec
        self._log = log
        self._rest = b""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "MKL_NUM_THREADS": str(threads),
        }
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers.worker",
            spec.place,
            json.dumps(dict(spec.settings)),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def load(self, model: str, threads: int, timeout: float) -> str:
        """Load the model; version and settings in one line."""
        return str(self._ask({"do": "load", "model": model, "threads": threads}, timeout))

    def answer(self, timeout: float) -> list[float] | None:
        """The numbers by which systems are compared."""
        numbers = self._ask({"do": "answer"}, timeout)
        return [float(number) for number in numbers] if isinstance(numbers, list) else None

    def prepare(self, workload: Workload, timeout: float) -> None:
        """Compile and warm up."""
        self._ask({"do": "prepare", "workload": asdict(workload)}, timeout)

    def run(self, workload: Workload, timeout: float) -> float:
        """Seconds of one run."""
        return float(str(self._ask({"do": "run", "workload": asdict(workload)}, timeout)))

    def stop(self) -> None:
        """Let it rest until the next request."""
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it, however it is."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the worker and to what it started (a compiler's helpers): they are a session of their own."""
        if self.alive:
            os.killpg(self._process.pid, number)

    def _ask(self, request: dict[str, object], timeout: float) -> object:
        """Send, wait, receive; the worker is stopped again afterwards."""
        if not self.alive:
            raise SystemFailed(self._ended())
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(timeout, str(request["do"]))
        except BrokenPipeError:
            raise SystemFailed(self._ended()) from None
        finally:
            self.stop()
        reply = json.loads(line)
        if "error" in reply:
            raise SystemFailed(str(reply["error"]))
        return reply["ok"]

    def _read_line(self, timeout: float, what: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            ready, _, _ = select.select([descriptor], [], [], max(left, 0.0))
            if not ready:
                self.close()
                raise SystemFailed(f"did not {what} within {timeout:.0f} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                self._process.wait()
                raise SystemFailed(self._ended())
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _ended(self) -> str:
        """Its exit code or signal, and the last line that it printed."""
        code = self._process.poll()
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return f"the process {how}: {self._last_line()}".rstrip(": ")

    def _last_line(self) -> str:
        self._log.flush()
        try:
            lines = Path(self._log.name).read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip()[:200] if lines else ""
