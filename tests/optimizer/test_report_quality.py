"""The table of precisions in its three forms."""

from __future__ import annotations

import io
import json
import math

from rich.console import Console

from torchweld.optimizer.report_quality import EncoderQuality, LanguageQuality, QualityReport

LANGUAGE = QualityReport(
    "m",
    (
        LanguageQuality("f32", 8, 3.3e-11, 2.1e-9, 1.0, 26.6552, 26.6551, 2000, "a text"),
        LanguageQuality("int8", 8, 2.5e-3, math.inf, 0.974, 26.757, 26.6551, 2000, "a text"),
    ),
)
ENCODER = QualityReport(
    "e", (EncoderQuality("bf16", 512, 1.5e-3, 2.5e-3, 1 - 1e-6, 1 - 3e-6, 12, 1536, "a text"),)
)


def test_table_fits_and_says_it_all() -> None:
    stream = io.StringIO()
    LANGUAGE.render(Console(file=stream, width=100))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for words in (
        "m against float64, 2000 tokens of a text; perplexity of float64: 26.6551",
        "97.40%",
        "2.5e-03",
    ):
        assert words in text
    assert "| bf16 | 512 | 1.5e-03 | 2.5e-03 | 1.0e-06 | 3.0e-06 | 12 |" in ENCODER.to_markdown()


def test_json() -> None:
    content = json.loads(LANGUAGE.to_json())
    assert (content["schema"], content["model"]) == (1, "m")
    exact, coarse = content["quality"]
    assert set(exact) >= {"precision", "kl_mean", "kl_max", "top1", "perplexity", "tokens", "text", "rows"}
    assert (exact["kl_mean"], exact["top1"], coarse["kl_max"]) == (3.3e-11, 1.0, "inf")
    (vector,) = json.loads(ENCODER.to_json())["quality"]
    assert (vector["relative_error_mean"], vector["vectors"], vector["rows"]) == (1.5e-3, 12, 512)
