"""The report's three faces say the same, fit the terminal and survive odd texts."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from torchweld.graph.target import Target
from torchweld.optimizer.ledger import Fallback, LaunchRecord, PassRecord, Phase, RefusalRecord
from torchweld.optimizer.report import WIDTH, Report

TARGET = Target("some cpu", 20.0, 400.0, 800.0, 1600.0, 3.0, 2 << 20, 32 << 20, 2, "measured")
REASON = "two anchors [bold]: input or output fusion | joins those"


def make_report() -> Report:
    layers = [
        LaunchRecord(name, ("matmul", "matmul"), layer, 3_456_789, 3_300_000, 123_456_789, 812.1, measured)
        for layer in range(3)
        for name, measured in (
            ("rmsnorm_qkv_linear", 900.0),
            ("rmsnorm_gate_up_silu_mul_and_a_long_tail", None),
        )
    ]
    passes = (
        PassRecord("canonicalize_linear", "reassoc", 7, (), 7, milliseconds=12.34),
        PassRecord(
            name="eliminate_common_subexpressions",
            exactness="exact",
            matched=6,
            refused=(RefusalRecord(REASON, "layers.0 llama.py:88: return self.down(x)"),) * 5,
            applied=1,
            kept=False,
            milliseconds=1234.5,
            modelled_saving_us=12_345.6,
            measured_saving_us=1200.1,
            error_added=1e-7,
        ),
    )
    return Report(
        model="tiny",
        target=TARGET,
        sizes=(("batch", 1), ("sequence", 64)),
        passes=passes,
        launches=(*layers, LaunchRecord("head", ("matmul",), None, 28_000, 28_000, 56_000, 12.5)),
        fallbacks=(Fallback("aten.sort.default", "no family has this op", "m.py:3: sort(x)"),),
        phases=(Phase("capture", 1.5), Phase("passes", 0.25)),
        max_relative_error=2.5e-6,
        rank_correlation=0.91,
        arena_bytes=1_500_000,
    )


def render(report: Report, width: int = WIDTH) -> str:
    stream = io.StringIO()
    report.render(Console(file=stream, width=width))
    return stream.getvalue()


def test_json_has_the_promised_keys_and_values() -> None:
    content = json.loads(make_report().to_json())
    assert content["kernels_per_layer"] == 2
    assert content["bytes_over_minimum"] == pytest.approx(3_456_789 / 3_300_000)
    assert content["eager_fallbacks"] == 1
    assert content["max_relative_error"] == 2.5e-6
    assert content["sizes"] == {"batch": 1, "sequence": 64}
    assert content["launches"] == 7
    assert content["target"]["origin"] == "measured"
    kernels = {kernel["name"]: kernel for kernel in content["kernels"]}
    assert kernels["rmsnorm_qkv_linear"]["uses"] == 3
    assert kernels["rmsnorm_qkv_linear"]["measured_us"] == 2700.0
    assert [record["kept"] for record in content["passes"]] == [True, False]
    assert content["passes"][1]["refused"][0]["reason"] == REASON
    assert content["fallbacks"][0]["source"] == "m.py:3: sort(x)"


@pytest.mark.parametrize(("value", "text"), [(math.inf, "inf"), (math.nan, "nan")])
def test_json_of_a_wrong_model_is_still_json(value: float, text: str) -> None:
    report = replace(make_report(), max_relative_error=value)
    assert json.loads(report.to_json())["max_relative_error"] == text


def test_unchecked_is_null_not_zero() -> None:
    report = Report("tiny", TARGET)
    assert json.loads(report.to_json())["max_relative_error"] is None
    assert ("max relative error", "not checked") in report.summary()


def test_render_fits_and_keeps_every_name() -> None:
    text = render(make_report())
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    joined = text.replace("\n", "")
    for word in ("rmsnorm_qkv_linear", "canonicalize_linear", "aten.sort.default", "some cpu", "[bold]"):
        assert word in joined


def test_render_survives_a_narrow_terminal() -> None:
    assert "kernels per layer" in render(make_report(), width=40)


def test_columns_that_nobody_filled_are_left_out() -> None:
    report = make_report()
    bare = replace(report, passes=report.passes[:1], launches=report.launches[-1:])
    assert "measured" in render(report).split("Kernels")[1]
    assert "measured" not in render(bare).split("Kernels")[1]


def test_empty_report_has_no_tables() -> None:
    assert Report("tiny", TARGET).tables() == ()
    assert "kernels per layer" in render(Report("tiny", TARGET))


def test_markdown_tables_are_whole() -> None:
    text = make_report().to_markdown()
    assert text.startswith("# tiny on some cpu (measured ceilings): batch 1, sequence 64\n")
    for block in text.split("## ")[1:]:
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len(rows) >= 3
        assert len({line.count("|") for line in rows}) == 1
