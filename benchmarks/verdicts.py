"""Ours against the best peer: the ratios that the project promised, with what must be and what is aimed at.

A ratio is how many times faster ours is (above 1: ours is faster). Source: the project's acceptance table for the CPU
executable. Comparisons are like with like: f32 with f32, bf16 with bf16; int8 with everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.plot import speed
from benchmarks.rows import Row

Accept = Callable[[str], bool]


@dataclass(frozen=True)
class Verdict:
    """One promise. value: a ratio, or a share (0 to 1); None where a side is missing, and then `detail` says which."""

    what: str
    value: float | None
    must: float
    aim: float
    is_share: bool
    detail: str

    @property
    def word(self) -> str:
        """ "aim", "must", "short" or "unknown"."""
        if self.value is None:
            return "unknown"
        return "aim" if self.value >= self.aim else "must" if self.value >= self.must else "short"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What can be said from these rows; nothing about models that they do not hold."""
    models = {row.model for row in rows}
    found: list[Verdict] = []
    for model, against, share in (
        ("gemma3", (1.8, 2.3), (0.75, 0.90)),
        ("smollm2", (2.2, 3.0), (0.70, 0.88)),
    ):
        if model in models:
            found += _decode(rows, model, against, share) + _prefill(rows, model)
    if "minilm" in models:
        found += _encoder(rows)
    return found


def _decode(
    rows: Sequence[Row], model: str, against: tuple[float, float], share: tuple[float, float]
) -> list[Verdict]:
    mine = [row for row in _measured(rows, model, "tg") if _is_ours(row.system)]
    theirs = [row for row in _measured(rows, model, "tg") if row.system == "llama.cpp"]
    what = f"{model}: decode, one row"
    best = max(mine, key=speed, default=None)
    read = Verdict(
        f"{what}, share of the pure read", None if best is None else best.share_of_read, *share, True,
        "no row of ours" if best is None else best.system,
    )  # fmt: skip
    return [_ratio(f"{what}, against llama.cpp", mine, theirs, against), read]


def _prefill(rows: Sequence[Row], model: str) -> list[Verdict]:
    there = _measured(rows, model, "pp")
    torch_bf16: Accept = lambda system: system.endswith("bf16") and not _is_ours(system)  # noqa: E731
    everyone: Accept = lambda system: not _is_ours(system)  # noqa: E731
    return [
        _ratio(
            f"{model}: prefill, bf16 against eager and torch.compile",
            [row for row in there if row.system == "torchweld bf16"],
            [row for row in there if torch_bf16(row.system)], (1.4, 2.0),
        ),
        _ratio(
            f"{model}: prefill, int8 against all",
            [row for row in there if row.system == "torchweld int8"],
            [row for row in there if everyone(row.system)], (1.1, 1.6),
        ),
    ]  # fmt: skip


_ENCODER: Final[tuple[tuple[str, Accept, tuple[float, float]], ...]] = (
    ("f32", lambda system: system.endswith("f32"), (1.0, 1.3)),
    ("bf16", lambda system: system.endswith(("bf16", "auto")), (1.0, 1.4)),
    ("int8", lambda system: system in ("onnxruntime int8", "OpenVINO auto"), (1.2, 1.8)),
)


def _encoder(rows: Sequence[Row]) -> list[Verdict]:
    """Geometric means over the shapes, against the best peer at each."""
    found = []
    for precision, accepted, (must, aim) in _ENCODER:
        ratios, best_peers = [], set()
        shapes = dict.fromkeys(row.workload for row in rows if row.model == "minilm")
        for shape in shapes:
            there = [row for row in _measured(rows, "minilm", "") if row.workload == shape]
            mine = [row for row in there if row.system == f"torchweld {precision}"]
            theirs = [row for row in there if accepted(row.system) and not _is_ours(row.system)]
            if mine and theirs:
                peer = max(theirs, key=speed)
                best_peers.add(peer.system)
                ratios.append(speed(mine[0]) / speed(peer))
        complete = bool(ratios) and len(ratios) == len(shapes)
        value = math.exp(sum(map(math.log, ratios)) / len(ratios)) if complete else None
        detail = (
            f"{len(ratios)} of {len(shapes)} shapes, best peers: {', '.join(sorted(best_peers)) or 'none'}"
        )
        what = f"minilm: {precision}, geometric mean"
        found.append(Verdict(what, value, must, aim, False, detail))
    return found


def _ratio(what: str, mine: Sequence[Row], theirs: Sequence[Row], limits: tuple[float, float]) -> Verdict:
    if not mine or not theirs:
        missing = " and ".join(name for name, rows in (("ours", mine), ("peers", theirs)) if not rows)
        return Verdict(what, None, *limits, False, f"no row of {missing}")
    own, peer = max(mine, key=speed), max(theirs, key=speed)
    return Verdict(what, speed(own) / speed(peer), *limits, False, f"{own.system} / {peer.system}")


def _measured(rows: Sequence[Row], model: str, prefix: str) -> list[Row]:
    return [r for r in rows if r.model == model and r.workload.startswith(prefix) and r.median]


def _is_ours(system: str) -> bool:
    return system.startswith("torchweld")


def to_markdown(found: Sequence[Verdict]) -> str:
    """A table of the verdicts, or an empty text where there are none."""
    if not found:
        return ""
    lines = ["| promise | measured | must | aim | reached | between |", "|---|---:|---:|---:|---|---|"]
    for verdict in found:
        numbers = " | ".join(
            _number(value, verdict.is_share) for value in (verdict.value, verdict.must, verdict.aim)
        )
        lines.append(f"| {verdict.what} | {numbers} | {verdict.word} | {verdict.detail} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, is_share: bool) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if is_share else f"{value:.2f}"
