"""Counting what others take, and refusing a busy machine."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.machine import (
    BUSY_SHARE,
    Description,
    Disturbance,
    MachineBusy,
    Watch,
    describe,
    process_seconds,
    read_cpu_times,
    refuse_if_busy,
)

TICKS = os.sysconf("SC_CLK_TCK")


def stat_line(user: int, idle: int, steal: int) -> str:
    return f"cpu  {user} 1 2 {idle} 3 4 5 {steal} 0 0\ncpu0 1 1 1 1 1 1 1 1\n"


def test_cpu_times_of_a_stat_file(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text(stat_line(100, 200, 300), "ascii")
    times = read_cpu_times(path)
    assert times is not None
    assert times.busy * TICKS == pytest.approx(100 + 1 + 2 + 4 + 5)
    assert times.idle * TICKS == pytest.approx(200 + 3)
    assert times.steal * TICKS == pytest.approx(300)


@pytest.mark.parametrize("text", ["", "cpu 1 2", "cpu a b c d e f g h"])
def test_unreadable_counts_are_unknown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "stat"
    path.write_text(text, "ascii")
    assert read_cpu_times(path) is None
    assert read_cpu_times(tmp_path / "absent") is None


def test_process_seconds_count_children_and_survive_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    rest = ["S", *["0"] * 10, "10", "20", "30", "40", "0"]  # utime, stime and those of ended children
    (folder / "stat").write_text(f"7 (a) b (c) {' '.join(rest)}", "ascii")
    assert process_seconds([7, 8], tmp_path) * TICKS == pytest.approx(100)


def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: str, own: float) -> Disturbance:
    path = tmp_path / "stat"
    path.write_text(stat_line(0, 0, 0), "ascii")
    used = iter([0.0, own])
    monkeypatch.setattr(machine, "read_cpu_times", lambda: read_cpu_times(path))
    monkeypatch.setattr(machine, "process_seconds", lambda pids: next(used))
    watch = Watch([1])
    path.write_text(after, "ascii")
    return watch.stop()


def test_own_work_is_not_held_against_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = watched(monkeypatch, tmp_path, stat_line(100 * TICKS, 100 * TICKS, 0), own=100.0)
    assert found.others == pytest.approx(0.0, abs=1e-3)
    assert found.steal == 0.0
    assert not found.disturbed


def test_others_and_steal_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = watched(monkeypatch, tmp_path, stat_line(100 * TICKS, 60 * TICKS, 40 * TICKS), own=50.0)
    assert found.others == pytest.approx(0.25, abs=1e-3)
    assert found.steal == pytest.approx(0.20, abs=1e-3)
    assert found.disturbed
    assert "others 25%" in str(found) and "steal 20%" in str(found)


@pytest.mark.parametrize(
    ("others", "steal"), [(BUSY_SHARE * 1.2, 0.0), (0.0, BUSY_SHARE * 1.2), (0.08, 0.08)]
)
def test_a_busy_machine_is_refused_unless_allowed(others: float, steal: float) -> None:
    found = Disturbance(others, steal, 1.5)
    with pytest.raises(MachineBusy, match="--busy"):
        refuse_if_busy(found, allow_busy=False)
    refuse_if_busy(found, allow_busy=True)


def test_idle_and_unknown_machines_are_not_refused() -> None:
    refuse_if_busy(Disturbance(BUSY_SHARE / 2, 0.0, 9.0), allow_busy=False)
    refuse_if_busy(Disturbance(None, None, None), allow_busy=False)
    assert "unknown" in str(Disturbance(None, None, None))


def test_description_names_a_file() -> None:
    slug = replace(describe(), processor="Intel(R) Xeon(R) / Gold, 2 cores", cpus=2).slug
    assert slug == "intel-r-xeon-r-gold-2-cores-2cpu"
    assert Description("!!!", 1, 1.0, "", "").slug.strip("-") == "1cpu"
