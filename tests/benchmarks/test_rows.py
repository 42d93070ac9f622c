"""Rows and their three spellings."""

import csv
import io
import json
from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.machine import Disturbance
from benchmarks.measure import summarize
from benchmarks.plot import to_svg
from benchmarks.roofline import Work
from benchmarks.rows import Row, from_json, measured_row, missing_row, render, to_csv, to_json, to_markdown
from benchmarks.workloads import Workload
from torchweld.graph.target import SM_80

DECODE = Workload("smollm2", "decode", 1, 128)
ENCODE = Workload("minilm", "encode", 8, 16)
CALM, NOISY = Disturbance(0.01, 0.0, 0.5), Disturbance(0.5, 0.0, 4.0)
CEILING = SM_80.ceilings()
TEXTS = st.text(max_size=20)
NUMBERS = st.none() | st.floats(1e-9, 1e9)


def row(system: str = "ours", value: float = 100.0, disturbance: Disturbance = CALM) -> Row:
    work = Work(bytes=128e9, flops=256e9)
    return measured_row(DECODE, system, summarize([value]), work, CEILING, disturbance, agreement=0.5)


ROWS = st.builds(
    Row, model=TEXTS, workload=TEXTS, system=TEXTS, median=NUMBERS, spread=NUMBERS, unit=TEXTS,
    share_of_read=NUMBERS, runs=st.integers(0, 99), reason=st.none() | TEXTS, disturbed=st.booleans(),
)  # fmt: skip


def test_derived_numbers() -> None:
    made = row(value=128.0)  # tokens per second: the run of 128 tokens took one second
    assert made.gb_s == pytest.approx(128.0) and made.gflops == pytest.approx(256.0)
    assert made.share_of_read == pytest.approx(128.0 / CEILING.read_gb_s)
    assert made.share_of_flops == pytest.approx(256.0 / CEILING.f32_gflops)
    assert (made.workload, made.unit, made.runs) == ("tg128", "tok/s", 1)


def test_times_are_milliseconds_per_call() -> None:
    made = measured_row(ENCODE, "ours", summarize([2.0]), Work(1e6, 1e6), CEILING, CALM)
    assert (made.unit, made.workload) == ("ms", "8x16") and made.gb_s == pytest.approx(0.5)


@given(st.lists(ROWS, max_size=4))
def test_json_returns(rows: list[Row]) -> None:
    assert from_json(to_json(rows)) == tuple(rows)


def test_json_has_the_promised_keys() -> None:
    loaded = json.loads(to_json([row(), missing_row(DECODE, "peer", "no wheel")]))
    keys = {"model", "workload", "system", "median", "spread", "unit", "share_of_read"}
    assert isinstance(loaded, list) and all(keys <= set(entry) for entry in loaded)
    assert loaded[1]["median"] is None and loaded[1]["reason"] == "no wheel"
    with pytest.raises(ValueError, match="benchmark rows"):
        from_json('[{"surprise": 1}]')


@given(st.lists(ROWS, min_size=1, max_size=2))
def test_csv_returns(rows: list[Row]) -> None:
    read = list(csv.DictReader(io.StringIO(to_csv(rows), newline="")))
    assert list(read[0]) == [field.name for field in fields(Row)]
    for line, made in zip(read, rows, strict=True):
        expected = {key: "" if value is None else str(value) for key, value in asdict(made).items()}
        assert line == expected


def test_markdown_holds_numbers_and_names_who_is_missing() -> None:
    rows = [row("ours", 128.0), row("noisy", 64.0, NOISY), missing_row(DECODE, "peer", "no wheel | for this")]
    text = to_markdown(rows)
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert lines[0] == "### smollm2" and len(table) == 4
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "| tg128 | ours | 128 |" in text and "128 ± 0.000" in text
    assert "64.0 \\*" in text and "more than 5 %" in text
    assert "- peer, tg128: no wheel \\| for this" in text


def test_markdown_groups_by_model_and_says_one_reason_once() -> None:
    other = Workload("smollm2", "prefill", 1, 512)
    rows = [
        missing_row(DECODE, "peer", "why"),
        missing_row(other, "peer", "why"),
        missing_row(ENCODE, "p", "no"),
    ]
    text = to_markdown(rows)
    assert text.count("why") == 1 and "- peer, tg128, pp512: why" in text
    assert text.index("### smollm2") < text.index("### minilm")


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="md, csv, json"):
        render([row()], "xml")  # type: ignore[arg-type]
    assert render([row()], "json") == to_json([row()])


def test_picture_orders_by_speed_and_escapes() -> None:
    rows = [row("a<b", 1.0), row("torchweld f32", 4.0), missing_row(DECODE, "peer", "no")]
    svg = to_svg(rows)
    assert svg.index("torchweld f32") < svg.index("a&lt;b")
    assert "peer" not in svg and svg.count("<rect") == 3
    assert 'width="420.0"' in svg and 'width="105.0"' in svg


@pytest.mark.parametrize(
    ("workload", "name"),
    [
        (Workload("m", "prefill", 1, 512), "pp512"),
        (Workload("m", "decode", 1, 128, past=1024), "tg128@d1024"),
        (Workload("m", "decode", 4, 32), "tg32x4"),
        (ENCODE, "8x16"),
    ],
)
def test_workloads_are_named_as_llama_bench_does(workload: Workload, name: str) -> None:
    assert workload.name == name
    assert workload.seconds(workload.in_unit(0.25)) == pytest.approx(0.25)
