"""Ratios against the best peer, and the words for them."""

import math

import pytest

from benchmarks.rows import Row
from benchmarks.verdicts import Verdict, to_markdown, verdicts

SHAPES = ("1x16", "8x128")


def speed(system: str, workload: str, value: float, share: float = 0.5, model: str = "smollm2") -> Row:
    return Row(model, workload, system, value, 0.0, "tok/s", share)


def time(system: str, workload: str, value: float) -> Row:
    return Row("minilm", workload, system, value, 0.0, "ms", 0.1)


def find(rows: list[Row], words: str) -> Verdict:
    (found,) = [verdict for verdict in verdicts(rows) if words in verdict.what]
    return found


def test_decode_is_compared_with_llama_cpp_alone() -> None:
    rows = [
        speed("torchweld f32", "tg128", 250.0, share=0.8),
        speed("torchweld int8", "tg128", 240.0, share=0.7),
        speed("llama.cpp", "tg128", 100.0),
        speed("OpenVINO GenAI", "tg128", 9999.0),
    ]
    verdict = find(rows, "against llama.cpp")
    assert (verdict.value, verdict.word) == (2.5, "must")
    assert verdict.detail == "torchweld f32 / llama.cpp"
    assert (find(rows, "share").value, find(rows, "share").word) == (0.8, "must")


def test_prefill_takes_the_best_peer_of_its_kind() -> None:
    rows = [
        speed("torchweld bf16", "pp512", 300.0), speed("torchweld int8", "pp512", 300.0),
        speed("eager bf16", "pp512", 100.0), speed("torch.compile bf16", "pp512", 150.0),
        speed("eager f32", "pp512", 9999.0 / 10), speed("OpenVINO GenAI", "pp512", 600.0),
    ]  # fmt: skip
    assert find(rows, "prefill, bf16").value == pytest.approx(2.0)
    assert find(rows, "prefill, bf16").word == "aim"
    slower = find(rows, "prefill, int8")
    assert slower.value == pytest.approx(300.0 / 999.9) and slower.word == "short"


def test_encoders_are_a_geometric_mean_over_all_shapes() -> None:
    rows = [time("torchweld f32", shape, 10.0) for shape in SHAPES]
    rows += [time("eager f32", SHAPES[0], 40.0), time("OpenVINO f32", SHAPES[0], 20.0)]
    rows += [time("eager f32", SHAPES[1], 5.0), time("OpenVINO auto", SHAPES[1], 0.1)]
    verdict = find(rows, "minilm: f32")
    assert verdict.value == pytest.approx(math.sqrt(2.0 * 0.5))
    assert "2 of 2 shapes" in verdict.detail and "OpenVINO f32, eager f32" in verdict.detail


def test_a_missing_side_is_said_and_not_guessed() -> None:
    rows = [
        speed("torchweld f32", "tg128", 250.0),
        Row("smollm2", "tg128", "llama.cpp", None, None, "tok/s", None),
    ]
    verdict = find(rows, "against llama.cpp")
    assert (verdict.value, verdict.word, verdict.detail) == (None, "unknown", "no row of peers")
    shape_missing = [time("torchweld f32", shape, 10.0) for shape in SHAPES] + [
        time("eager f32", SHAPES[0], 1.0)
    ]
    assert find(shape_missing, "minilm: f32").value is None
    assert verdicts([]) == []


def test_table() -> None:
    assert to_markdown([]) == ""
    text = to_markdown(
        [Verdict("speed", 1.234, 1.0, 2.0, False, "a / b"), Verdict("share", 0.5, 0.7, 0.9, True, "")]
    )
    assert "| speed | 1.23 | 1.00 | 2.00 | must | a / b |" in text
    assert "| share | 50% | 70% | 90% | short |  |" in text
