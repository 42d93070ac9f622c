"""DecodeReport: equal layers on one line, every width, stable JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from torchweld.optimizer.ledger import Fallback
from torchweld.optimizer.report_decode import DecodeReport, StateRecord

PROOF = "and_1 shows 0 <= d <= 7 for every size, with d = query position - key position"


def layer(number: int, kind: str = "window") -> StateRecord:
    window = 8 if kind == "window" else 0
    return StateRecord(
        number, kind, window, 2, 16, 8, "float32", 2 * 24 * 4, PROOF if window else "is_causal"
    )


REPORT = DecodeReport(
    "tiny",
    tuple(layer(number, "causal" if number == 2 else "window") for number in range(6)),
    kernels_per_layer=6,
    launches=37,
    limit=128,
)


def rendered(report: DecodeReport, width: int) -> str:
    stream = io.StringIO()
    report.render(Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_equal_layers_stand_together(width: int) -> None:
    text = rendered(REPORT, width)
    assert "6 layers: 5 window 8, 1 causal" in text and "at most 128" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["0-1,", "3-5", "window", "8", "2", "16", "8", "float32", "192"] in rows
    assert ["2", "causal", "2", "16", "8", "float32", "192"] in rows
    assert all(len(line) <= width for line in text.splitlines())
    assert "0 <= d <= 7 for every size" in text


def test_bytes_count_what_is_visible() -> None:
    assert REPORT.bytes_per_token == 6 * 192
    assert REPORT.cache_bytes(5) == 5 * 6 * 192
    assert REPORT.cache_bytes(100) == 192 * (5 * 8 + 100)


def test_json() -> None:
    content = json.loads(REPORT.to_json())
    assert (content["decodes"], content["refusal"], content["limit"]) == (True, None, 128)
    assert (content["kernels_per_layer"], content["eager_fallbacks"]) == (6, 0)
    assert len(content["layers"]) == 6
    first = content["layers"][0]
    assert (first["kind"], first["window"], first["bytes_per_token"]) == ("window", 8, 192)
    assert first["mask_proof"] == PROOF


def test_a_refusal_is_all_there_is_to_say() -> None:
    report = DecodeReport("bert", refusal="attention without a causal mask (attention = op at model.py:3)")
    assert not report.decodes and "does not decode" in rendered(report, 80)
    assert json.loads(report.to_json())["layers"] == []
    assert report.to_markdown().count("\n") == 3


def test_fallbacks_are_shown() -> None:
    report = DecodeReport(
        "slow", REPORT.layers, fallbacks=(Fallback("sort_1", "no kernel for it", "model.py:7"),)
    )
    assert "no kernel for it" in rendered(report, 80) and "sort_1" in report.to_markdown()


def test_the_encoder_is_counted_by_itself() -> None:
    cross = StateRecord(0, "cross", 0, 2, 16, 8, "float32", 192, "no mask in the source")
    report = DecodeReport("tiny", REPORT.layers, crosses=(cross, cross))
    assert report.bytes_per_token == REPORT.bytes_per_token
    assert "2 cross attentions, 384 bytes per position of the source" in rendered(report, 120)
    assert [entry["kind"] for entry in json.loads(report.to_json())["crosses"]] == ["cross", "cross"]
    assert "cross attentions" not in rendered(REPORT, 120)
