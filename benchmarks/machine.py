"""The machine under the numbers: what it is, what it can do at most, and whether anybody else uses it.

Times mean nothing without these: the same program is twice as slow beside a neighbour. CPU seconds are counted from
/proc (Linux); where there is no /proc the counts are unknown (None), and a busy machine cannot be refused.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import best_seconds
from torchweld.codegen.cache import Cache
from torchweld.codegen.probe import describe_machine, measure, measured_target
from torchweld.codegen.toolchain import ToolchainError
from torchweld.graph.target import Target

BUSY_SHARE = 0.10
"""Share of all CPU time that others may use before a run is refused."""
DISTURBED_SHARE = 0.05
"""Share of others, or of steal, from which a row is marked as disturbed."""


class MachineBusy(RuntimeError):
    """Somebody else uses the processor: says how much of it, and how to run all the same."""


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of all CPUs together since boot: working, idle, and taken away by the host of a virtual machine."""

    busy: float
    idle: float
    steal: float


@dataclass(frozen=True)
class Disturbance:
    """Shares (0 to 1) of all CPU time during a measurement that others and the host took, and the load average."""

    others: float | None
    steal: float | None
    load: float | None

    @property
    def disturbed(self) -> bool:
        """Whether either share is above DISTURBED_SHARE."""
        return any(share is not None and share > DISTURBED_SHARE for share in (self.others, self.steal))

    def __str__(self) -> str:
        def percent(share: float | None) -> str:
            return "unknown" if share is None else f"{share:.0%}"

        load = "unknown" if self.load is None else f"{self.load:.2f}"
        return f"load {load}, others {percent(self.others)}, steal {percent(self.steal)}"


@dataclass(frozen=True)
class Description:
    """Processor, logical CPUs, memory in GB, system and versions."""

    processor: str
    cpus: int
    memory_gb: float
    system: str
    python: str

    @property
    def slug(self) -> str:
        """The processor as part of a file name: lower case letters, digits and dashes."""
        kept = "".join(c.lower() if c.isalnum() else "-" for c in self.processor)
        return f"{'-'.join(filter(None, kept.split('-')))[:40].strip('-')}-{self.cpus}cpu"


def describe() -> Description:
    """This machine, unmeasured."""
    machine = describe_machine()
    return Description(
        processor=machine.name,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=round(_memory_bytes() / 1e9, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def ceilings(threads: int | None = None) -> Target:
    """What so many cores (default: all) can do at most, measured now (a few seconds; nothing from the cache).

    Reading as the probe of the cost model finds it. Arithmetic: the better of that probe and a large matrix product of
    torch, which also uses the matrix units (AMX) that the probe leaves out.
    """
    cache, machine = Cache(), describe_machine()
    try:
        target = measure(replace(machine, cpus=machine.cpus[:threads]), cache)
    except ToolchainError:
        target = measured_target(cache)
    f32, bf16 = (matmul_gflops(dtype, target.cores) for dtype in (torch.float32, torch.bfloat16))
    f32 = max(f32, target.f32_gflops)
    return replace(
        target,
        f32_gflops=f32,
        bf16_gflops=max(bf16, target.bf16_gflops),
        int8_gops=max(bf16, target.int8_gops),
    )


def matmul_gflops(dtype: torch.dtype, threads: int, size: int = 2048, repeats: int = 5) -> float:
    """The best rate of torch.mm of two square matrices in so many threads, GFLOP/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, other = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        torch.mm(one, other)
        return 2.0 * size**3 / best_seconds(lambda: torch.mm(one, other), repeats) / 1e9
    finally:
        torch.set_num_threads(before)


def read_cpu_times(path: Path = Path("/proc/stat")) -> CpuTimes | None:
    """The first line of /proc/stat in seconds; None where it cannot be read."""
    try:
        fields = [int(field) for field in path.read_text("ascii").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    if len(fields) < 8:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (ticks / _ticks() for ticks in fields[:8])
    return CpuTimes(user + nice + system + irq + softirq, idle + iowait, steal)


def process_seconds(pids: Iterable[int], root: Path = Path("/proc")) -> float:
    """CPU seconds that these processes have used, with their ended children; 0 for one that is gone."""
    total = 0
    for pid in pids:
        try:
            # the name in brackets may hold spaces: count from behind it
            fields = (root / str(pid) / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15])
        except (OSError, ValueError):
            continue
    return total / _ticks()


def _ticks() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def load_average() -> float | None:
    """The load average of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class Watch:
    """Counts what others and the host take from `start` on, `ours` being the processes that belong to the run."""

    def __init__(self, ours: Iterable[int] = ()) -> None:
        self.ours = tuple(ours) or (os.getpid(),)
        self._times, self._used = read_cpu_times(), process_seconds(self.ours)

    def stop(self) -> Disturbance:
        """The shares since the start; may be asked more than once."""
        now = read_cpu_times()
        if now is None or self._times is None:
            return Disturbance(None, None, load_average())
        busy, steal = now.busy - self._times.busy, now.steal - self._times.steal
        total = busy + steal + now.idle - self._times.idle
        if total <= 0:
            return Disturbance(None, None, load_average())
        used = process_seconds(self.ours) - self._used
        return Disturbance(max(busy - used, 0.0) / total, steal / total, load_average())


def check_idle(allow_busy: bool, seconds: float = 1.0) -> Disturbance:
    """Watch the machine for a moment: how busy it is. Raises MachineBusy, unless `allow_busy`."""
    watch = Watch()
    time.sleep(seconds)
    found = watch.stop()
    refuse_if_busy(found, allow_busy)
    return found


def refuse_if_busy(found: Disturbance, allow_busy: bool) -> None:
    """Raises MachineBusy where others or the host take more than BUSY_SHARE, unless `allow_busy`."""
    taken = (found.others or 0.0) + (found.steal or 0.0)
    if taken > BUSY_SHARE and not allow_busy:
        raise MachineBusy(
            f"others use {taken:.0%} of this machine ({found}); a benchmark needs less than {BUSY_SHARE:.0%}: "
            "wait, or measure all the same with --busy"
        )
