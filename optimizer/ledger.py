"""What each pass did and what each kernel costs, as facts; optimizer/report.py presents them.

The pipeline writes into a `Ledger` while it works; everything in it is a frozen record. Units are in the
names: `_us` microseconds, `milliseconds`, `bytes_` bytes of one launch, `flops` operations of one launch (a
multiply-add counts as two).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class RefusalRecord:
    """Why a pass left `count` sites alone, and where one of them is: the node and the user's source line."""

    reason: str
    where: str = ""
    count: int = 1


@dataclass(frozen=True)
class PassRecord:
    """One pass over one program; matched = applied + refused (+ what was left when the fuel ran out).

    kept: False if the rewrite was taken back (it did not pay, or exceeded the error budget).
    `modelled_saving_us` is per call of the program at the report's sizes; `measured_saving_us` and
    `error_added` (growth of the largest relative error against float64) are None where nobody measured.
    runs: how many runs this record sums up (`merge_runs`).
    """

    name: str
    exactness: str
    matched: int
    refused: tuple[RefusalRecord, ...]
    applied: int
    kept: bool = True
    milliseconds: float = 0.0
    modelled_saving_us: float = 0.0
    measured_saving_us: float | None = None
    error_added: float | None = None
    runs: int = 1

    @property
    def refused_sites(self) -> int:
        """How many sites were refused, whatever the reason."""
        return sum(refusal.count for refusal in self.refused)

    def reasons(self) -> tuple[tuple[str, int], ...]:
        """Each distinct reason for refusal and for how many sites it was given, most frequent first."""
        counts: dict[str, int] = {}
        for refusal in self.refused:
            counts[refusal.reason] = counts.get(refusal.reason, 0) + refusal.count
        return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def merge_runs(passes: Sequence[PassRecord]) -> tuple[PassRecord, ...]:
    """One record per pass, in order of first run, for pipelines that run a pass several times.

    Work and savings are summed. Refusals are those of the last run: what became legal in between is not refused.
    """
    by_name: dict[str, PassRecord] = {}
    for record in passes:
        first = by_name.get(record.name)
        by_name[record.name] = record if first is None else _join_runs(first, record)
    return tuple(by_name.values())


def _join_runs(first: PassRecord, later: PassRecord) -> PassRecord:
    return replace(
        later,
        matched=first.applied + later.matched,
        applied=first.applied + later.applied,
        kept=first.kept and later.kept,
        milliseconds=first.milliseconds + later.milliseconds,
        modelled_saving_us=first.modelled_saving_us + later.modelled_saving_us,
        measured_saving_us=_add(first.measured_saving_us, later.measured_saving_us),
        error_added=_add(first.error_added, later.error_added),
        runs=first.runs + later.runs,
    )


def _add(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class MaskRecord:
    """What the masks of `count` attentions were proved to be, how, and where one of them is.

    name: none, causal, window 8, prefix, tensor; with what stays a tensor beside it, as in "causal and padding".
    """

    name: str
    proof: str
    where: str
    count: int = 1


@dataclass(frozen=True)
class LaunchRecord:
    """One launch of one kernel.

    parts: kind of each part ("matmul", "row", "attention"). layer: number of the decoder layer that it
    belongs to, None outside. bytes_minimum: every input of the group read once, every output written once.
    ops: what was fused. sources: the user's source lines.
    """

    kernel: str
    parts: tuple[str, ...]
    layer: int | None
    bytes_moved: int
    bytes_minimum: int
    flops: int
    modelled_us: float
    measured_us: float | None = None
    ops: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelRecord:
    """One kernel and all its launches in one call of the program: bytes, FLOPs and times are their sums."""

    name: str
    parts: tuple[str, ...]
    uses: int
    layers: tuple[int | None, ...]
    bytes_moved: int
    bytes_minimum: int
    flops: int
    modelled_us: float
    measured_us: float | None
    ops: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Fallback:
    """Something that runs eagerly: the node or group, the layer it is in, why, and the user's source line."""

    what: str
    reason: str
    source: str = ""
    layer: int | None = None


@dataclass(frozen=True)
class LibraryRecord:
    """A kernel with products against the same in ATen, at a number of rows; its bucket of rows is decided by that.

    shapes: rows x depth x columns of its products.  Times are milliseconds of one launch, None where nobody measured.
    copied_bytes: weights that ATen needs beside the packed ones.  reason: why it was not measured or not chosen,
    empty where the times say it.
    """

    kernel: str
    rows: int
    shapes: str
    ours_ms: float | None
    aten_ms: float | None
    chosen: bool
    reason: str = ""
    copied_bytes: int = 0

    def sentence(self) -> str:
        """For a reader: "linear 1024x384x1536: ATen 1.9 ms, ours 2.3 ms"."""
        parts = [] if not self.shapes else [f"linear {self.shapes}"]
        if self.ours_ms is not None and self.aten_ms is not None:
            parts.append(f"ATen {self.aten_ms:.3g} ms, ours {self.ours_ms:.3g} ms")
        parts += [self.reason] if self.reason else []
        if self.chosen and self.copied_bytes:
            parts.append(f"holds {self.copied_bytes / 1e6:.1f} MB of weights twice")
        return ": ".join(parts)


@dataclass(frozen=True)
class Phase:
    """Wall-clock seconds that one phase of compilation took ("capture", "passes", "build")."""

    name: str
    seconds: float


@dataclass
class Ledger:
    """Collects records in the order in which things happened; the one mutable object here."""

    passes: list[PassRecord] = field(default_factory=list)
    masks: list[MaskRecord] = field(default_factory=list)
    launches: list[LaunchRecord] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)

    def kernels(self) -> tuple[KernelRecord, ...]:
        """The launches so far, one record per kernel."""
        return group_launches(self.launches)


def group_launches(launches: Sequence[LaunchRecord]) -> tuple[KernelRecord, ...]:
    """One record per kernel name, in order of first launch; times count as measured if all launches' are."""
    by_kernel: dict[str, list[LaunchRecord]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    return tuple(_sum_launches(name, group) for name, group in by_kernel.items())


def _sum_launches(name: str, group: Sequence[LaunchRecord]) -> KernelRecord:
    measured = [launch.measured_us for launch in group if launch.measured_us is not None]
    return KernelRecord(
        name=name,
        parts=group[0].parts,
        uses=len(group),
        layers=tuple(launch.layer for launch in group),
        bytes_moved=sum(launch.bytes_moved for launch in group),
        bytes_minimum=sum(launch.bytes_minimum for launch in group),
        flops=sum(launch.flops for launch in group),
        modelled_us=sum(launch.modelled_us for launch in group),
        measured_us=sum(measured) if len(measured) == len(group) else None,
        ops=group[0].ops,
        sources=tuple(dict.fromkeys(source for launch in group for source in launch.sources)),
    )


def kernels_per_layer(launches: Sequence[LaunchRecord], fallbacks: Sequence[Fallback] = ()) -> int:
    """The most launches that any layer takes (a fallback counts as one); without layers, all of them."""
    layers = [launch.layer for launch in launches] + [fallback.layer for fallback in fallbacks]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        return len(layers)
    return max(numbered.count(layer) for layer in set(numbered))


def bytes_over_minimum(launches: Sequence[LaunchRecord]) -> float:
    """Bytes moved over the least possible: the worst of the whole program and each layer; 1.0 of nothing.

    A large output head would hide wasteful layers in the sum over the program, hence the layers one by one.
    """
    layers = {launch.layer for launch in launches if launch.layer is not None}
    by_layer = [[launch for launch in launches if launch.layer == layer] for layer in layers]
    return max(_ratio(selection) for selection in (launches, *by_layer))


def _ratio(launches: Sequence[LaunchRecord]) -> float:
    minimum = sum(launch.bytes_minimum for launch in launches)
    return sum(launch.bytes_moved for launch in launches) / minimum if minimum else 1.0
