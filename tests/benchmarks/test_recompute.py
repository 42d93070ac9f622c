"""The benchmark of the cache against recomputing: rows and arithmetic on a small model. What is fast is not decided
here."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from benchmarks import recompute
from benchmarks.recompute import RecomputeRow, least_bytes, measure_model, render
from torchweld.decoding.cached import CachedModel
from torchweld.passes.rewrite_kv_cache import LayerState

WINDOW, HEADS, SIZE = 8, 1, 16
PER_TOKEN = 2 * HEADS * SIZE * 4


@pytest.fixture(scope="module")
def model() -> CachedModel:
    torch.manual_seed(0)
    config = transformers.Exaone4Config(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=HEADS, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return CachedModel.from_module(transformers.Exaone4ForCausalLM(config).eval())


def test_a_row_of_a_small_model(model: CachedModel) -> None:
    row = measure_model("tiny", model, positions=20, rounds=3, least_seconds=0.0)
    assert row.reason is None and row.rounds == 3 and row.same
    assert row.cached is not None and row.recomputed is not None and row.ratio is not None
    assert row.cached > 0 < row.recomputed and row.ratio > 0
    assert row.least_bytes == PER_TOKEN * (WINDOW + 20) <= row.cache_bytes == model.cache.nbytes
    assert model.lengths == (20,), "the last step stands; every other one was undone"


def test_the_least_bytes_stop_growing_at_the_window() -> None:
    states = [
        LayerState("a", kind, window, 2, 16, 8, torch.float32, "")
        for kind, window in (("causal", 0), ("window", 8))
    ]
    each = 2 * (16 + 8) * 4
    assert [least_bytes(states, n) for n in (1, 8, 9, 100)] == [each * n for n in (2, 16, 17, 108)]


GOOD = RecomputeRow("tiny", 512, 100.0, 4.0, 25.0, 1040, 1000, 5, True)


def test_both_promises_count() -> None:
    assert GOOD.reached and GOOD.bytes_ratio == 1.04
    assert not replace(GOOD, ratio=19.9).reached
    assert not replace(GOOD, cache_bytes=1051).reached
    failed = RecomputeRow("tiny", 512, None, None, None, reason="no kernels")
    assert failed.bytes_ratio is None and not failed.reached


def test_formats() -> None:
    rows = [GOOD, replace(GOOD, model="slow", ratio=3.0, disturbed=True)]
    rows.append(RecomputeRow("broken", 512, None, None, None, reason="no kernels"))
    first = json.loads(render(rows, "json"))[0]
    assert (first["ratio"], first["bytes_ratio"], first["reached"]) == (25.0, 1.04, True)
    lines = list(csv.DictReader(io.StringIO(render(rows, "csv"))))
    assert [line["reached"] for line in lines] == ["True", "False", "False"]
    table = render(rows, "md")
    assert "| tiny | 512 | 100.00 | 4.000 | 25.0 | 0.00 | 0.00 | 1.040 | yes | yes |" in table
    assert "\\*" in table and "- broken: no kernels" in table
    with pytest.raises(ValueError, match="expected md, csv or json"):
        render(rows, "html")  # type: ignore[arg-type]


def test_bad_options_are_refused_before_anything_is_measured() -> None:
    app = typer.Typer()
    app.command()(recompute.main)
    for arguments, words in (
        (["-o", "html"], "expected one of md, csv, json"),
        (["--busy", "--model", "smolm2"], "no such model"),
        (["--busy", "--precision", "f64"], "f64"),
    ):
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert done.exit_code == 2 and words in done.output, done.output
