"""Cold and warm starts: the order, the folders, and what happens to those that fail."""

from pathlib import Path

import pytest

from benchmarks.coldstart import Start, StartFailed, measure_starts, run_child, to_rows
from benchmarks.coldstart_child import phase
from benchmarks.machine import Watch


def test_each_round_starts_cold_and_continues_warm_in_the_same_folder() -> None:
    seen: list[tuple[str, Path, bool]] = []

    def run(start: Start, folder: Path) -> dict[str, float]:
        seen.append((start.name, folder, any(folder.iterdir())))
        (folder / "something").touch()
        return {"load": 1.0}

    samples, failures = measure_starts([("a", "f32"), ("b", "bf16")], 2, run, lambda line: None)
    assert [name for name, _, _ in seen] == ["a f32, cold", "a f32, warm", "b bf16, cold", "b bf16, warm"] * 2
    assert [filled for _, _, filled in seen] == [False, True] * 4
    assert len({folder for _, folder, _ in seen}) == 4
    assert not any(folder.exists() for _, folder, _ in seen)
    assert not failures and all(len(runs) == 2 for runs in samples.values())


def test_one_that_fails_is_out_with_its_reason() -> None:
    started: list[str] = []

    def run(start: Start, folder: Path) -> dict[str, float]:
        started.append(start.name)
        if start.system == "bad":
            raise StartFailed("no compiler")
        return {"load": float(len(started)), "run": 1.0}

    watch = Watch()
    samples, failures = measure_starts([("bad", "f32"), ("good", "f32")], 3, run, lambda line: None)
    assert started.count("bad f32, cold") == 1 and "bad f32, warm" not in started
    rows = to_rows("m", samples, failures, watch)
    assert [row.reason for row in rows if row.median is None] == ["StartFailed: no compiler"]
    cold = [row for row in rows if row.system == "good f32, cold"]
    assert [(row.workload, row.median, row.unit) for row in cold] == [("load", 4.0, "s"), ("run", 1.0, "s")]


def test_a_child_that_cannot_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="KeyError: 'no such system'"):
        run_child(Start("no such system", "f32", False), "model", tmp_path, 1)


def test_phases_have_names_and_times() -> None:
    phases: dict[str, float] = {}
    with phase(phases, "one"):
        pass
    with phase(phases, "two"):
        pass
    assert list(phases) == ["one", "two"] and all(seconds >= 0 for seconds in phases.values())
