"""Systems in processes of their own: what works is measured, what fails is named with its reason and loses nothing."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import session
from benchmarks.peers.inputs import agreement, sentences, tokens
from benchmarks.peers.process import ROOT, SystemFailed, SystemProcess
from benchmarks.peers.session import Plan, absent_reason, measure_models, with_ceiling, workloads_of
from benchmarks.peers.systems import MODELS, SYSTEMS, SystemSpec, chosen_systems
from benchmarks.peers.worker import serve
from benchmarks.publish import update_page, write_results
from benchmarks.roofline import ModelFacts
from benchmarks.workloads import Workload
from torchweld.graph.target import SM_80

TOY = "tests.benchmarks.toy_system:Toy"
CEILING = SM_80.ceilings()
WORKLOAD = Workload("smollm2", "decode", 1, 10)
FACTS = ModelFacts("smollm2", 1000, 100, 600, (None, 8), 2, 1, 4, True)


def toy(name: str, behaviour: str = "good", at: str = "run") -> SystemSpec:
    return SystemSpec(name, TOY, ("smollm2",), "f32", 4.0, 4.0, {"behaviour": behaviour, "at": at})


@contextmanager
def started(spec: SystemSpec, path: Path) -> Iterator[SystemProcess]:
    with path.open("wb") as log:
        process = SystemProcess(spec, 1, log)
        try:
            yield process
        finally:
            process.close()


def rests(pid: int) -> bool:
    """Whether the process is stopped, or soon is: the signal takes a moment."""
    for _ in range(1000):
        if Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] in "tT":
            return True
        time.sleep(0.01)
    return False


def test_a_system_answers_and_rests_between_its_turns(tmp_path: Path) -> None:
    with started(toy("toy"), tmp_path / "log") as process:
        assert process.load("smollm2", 3, 60) == "toy on smollm2 with 3 threads, OMP_NUM_THREADS=1"
        assert rests(process.pid)  # so it cannot spin while others are measured
        process.prepare(WORKLOAD, 60)
        assert process.answer(60) == [1.0, 2.0]
        assert process.run(WORKLOAD, 60) == 0.5
        assert rests(process.pid)
    assert not process.alive
    assert "a library that talks" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("behaviour", "timeout", "message"),
    [
        ("raises", 60.0, "RuntimeError: no such instruction"),
        ("dies", 60.0, "killed by signal 6"),
        ("hangs", 0.3, "did not run within 0 s"),
    ],
)
def test_failures_have_reasons(tmp_path: Path, behaviour: str, timeout: float, message: str) -> None:
    with started(toy("toy", behaviour), tmp_path / "log") as process:
        process.load("smollm2", 1, 60)
        with pytest.raises(SystemFailed, match=message):
            process.run(WORKLOAD, timeout)
        if behaviour == "raises":
            process.prepare(WORKLOAD, 60)  # an error is no end
        else:
            with pytest.raises(SystemFailed):
                process.prepare(WORKLOAD, 60)


def test_a_whole_session_survives_every_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "load_facts", lambda model: FACTS)
    systems = [
        toy("eager f32"),
        toy("raises", "raises"),
        toy("dies", "dies", "prepare"),
        toy("unloadable", "raises", "load"),
        toy("differs", "differs"),
        replace(toy("absent"), requires=("no_such_package_here",)),
        replace(toy("nowhere"), place="benchmarks.no_such_module:Toy"),
    ]
    said: list[str] = []
    rows, descriptions = measure_models(["smollm2"], systems, Plan(1, 3, True), CEILING, said.append)
    assert [(row.workload, row.system) for row in rows] == [
        (workload.name, spec.name) for workload in workloads_of("smollm2", True) for spec in systems
    ]
    good = [row for row in rows if row.median is not None]
    assert [row.system for row in good] == ["eager f32", "eager f32"]
    assert [row.median for row in good] == [512 / 0.5, 32 / 0.5]
    assert all(row.runs == 3 and row.spread == 0 and row.agreement == pytest.approx(1) for row in good)
    reasons = {row.system: row.reason or "" for row in rows if row.median is None}
    expected = {
        "raises": "no such instruction", "dies": "signal 6", "unloadable": "cannot load", "differs": "cosine",
        "absent": "'no_such_package_here' is not installed", "nowhere": "No module named",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    assert all(expected[name] in reasons[name] for name in expected)
    assert set(descriptions) >= {"eager f32", "raises"}


def test_a_model_that_cannot_be_loaded_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str) -> ModelFacts:
        raise FileNotFoundError("no weights")

    monkeypatch.setattr(session, "load_facts", load)
    rows, _ = measure_models(["smollm2"], [toy("toy")], Plan(1, 1, True), CEILING, lambda line: None)
    assert [row.reason for row in rows] == ["FileNotFoundError: no weights"] * 2


def test_shares_follow_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "load_facts", lambda model: FACTS)
    systems = [toy("toy")]
    rows, _ = measure_models(["smollm2"], systems, Plan(1, 1, True), CEILING, lambda line: None)
    twice = replace(CEILING, read_gb_s=CEILING.read_gb_s * 2, f32_gflops=CEILING.f32_gflops * 4)
    for row, scaled in zip(rows, with_ceiling(rows, systems, CEILING, twice), strict=True):
        assert scaled.share_of_read == pytest.approx((row.share_of_read or 0) / 2)
        assert scaled.share_of_flops == pytest.approx((row.share_of_flops or 0) / 4)
        assert (scaled.median, scaled.gb_s) == (row.median, row.gb_s)


def test_a_model_is_written_as_soon_as_it_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(model: str) -> ModelFacts:
        if model == "gemma3":
            raise KeyboardInterrupt  # the run is broken off at the second model
        return FACTS

    page = tmp_path / "performance.md"
    page.write_text("<!-- peers-smollm2:begin -->\n<!-- peers-smollm2:end -->\n", "utf-8")
    monkeypatch.setattr(session, "load_facts", load)
    monkeypatch.setattr(command, "ceilings", lambda threads: CEILING)
    monkeypatch.setattr(command, "chosen_systems", lambda names, models: (toy("toy"),))
    monkeypatch.setattr(command, "write_results", partial(write_results, folder=tmp_path / "results"))
    monkeypatch.setattr(command, "update_page", partial(update_page, page=page))
    with pytest.raises(KeyboardInterrupt):
        command.main(quick=True, models="smollm2,gemma3", rounds=1, busy=True, write=True)
    assert "| pp512 | toy |" in page.read_text("utf-8")
    assert [p.name.rpartition("-")[2] for p in sorted((tmp_path / "results").iterdir())] == [
        "smollm2.json", "smollm2.md", "smollm2.svg",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_no_stopped_worker_outlives_its_parent(tmp_path: Path) -> None:
    program = (
        "import os, signal\n"
        "from tests.benchmarks.test_peers import SystemProcess, toy\n"
        f"log = open({str(tmp_path / 'log')!r}, 'wb')\n"
        "process = SystemProcess(toy('toy'), 1, log)\n"
        "process.load('smollm2', 1, 60)\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=100, check=False
    )
    pid = int(done.stdout)
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.01)
    pytest.fail(f"worker {pid} is still there")


def test_worker_answers_line_by_line() -> None:
    requests = [
        {"do": "load", "model": "smollm2", "threads": 1},
        {"do": "run", "workload": asdict(WORKLOAD)},
        {"do": "dance", "workload": asdict(WORKLOAD)},
        {"do": "answer"},
    ]
    answers = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        serve(TOY, {}, io.StringIO("\n".join(map(json.dumps, requests))), answers)
    first, second, third, fourth = map(json.loads, answers.getvalue().splitlines())
    assert "toy on smollm2" in first["ok"]
    assert (second["ok"], fourth["ok"]) == (0.5, [1.0, 2.0])
    assert "unknown request 'dance'" in third["error"]


def test_quick_leaves_out_what_compiles_for_minutes() -> None:
    slow = [spec for spec in SYSTEMS if spec.slow]
    assert slow and all("torch.compile" in spec.name for spec in slow)
    assert all("--quick" in (absent_reason(spec, quick=True) or "--quick") for spec in slow)
    assert all("--quick" not in (absent_reason(spec, quick=False) or "") for spec in slow)


def test_systems_are_chosen_by_the_beginning_of_their_names() -> None:
    names = [spec.name for spec in chosen_systems("torchweld, llama", MODELS)]
    assert names == ["torchweld f32", "torchweld bf16", "torchweld int8", "llama.cpp"]
    assert "llama.cpp" not in [spec.name for spec in chosen_systems(None, ("minilm",))]
    with pytest.raises(ValueError, match=r"unknown system 'lama'.*llama\.cpp"):
        chosen_systems("lama", MODELS)
    assert len({spec.name for spec in SYSTEMS}) == len(SYSTEMS)


def test_inputs_are_the_same_for_everybody() -> None:
    assert tokens(20) == tokens(20) and len(set(tokens(400))) > 300
    assert tokens(20, seed=1) != tokens(20)
    batch = sentences(3, 5)
    assert [len(row) for row in batch] == [5, 5, 5] and len({tuple(row) for row in batch}) == 3


def test_agreement_is_a_cosine() -> None:
    assert agreement([1.0, 2.0], [2.0, 4.0]) == pytest.approx(1.0)
    assert agreement([1.0, 0.0], [0.0, 1.0]) == pytest.approx(0.0)
    assert agreement([1.0], [1.0, 2.0]) is None
    assert agreement([0.0, 0.0], [1.0, 2.0]) is None
