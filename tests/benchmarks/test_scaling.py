"""Series over growing sizes, on a small model that is really compiled."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from benchmarks.fit import Growth
from benchmarks.roofline import ModelFacts
from benchmarks.scaling import (
    ROUNDS,
    Series,
    Setting,
    first_layers,
    measure_series,
    measure_workload,
    promises,
    to_markdown,
)
from benchmarks.workloads import Workload
from torchweld.decoding.cached import CachedModel
from torchweld.graph.target import SM_80

FACTS = ModelFacts("toy", 20_000, 8_192, 4 * 28_192, (None, None), 4, 2, 16, True)


@pytest.fixture(scope="module")
def setting() -> Setting:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=28_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = CachedModel.from_module(transformers.LlamaForCausalLM(config).eval())
    return Setting(model, FACTS, SM_80.ceilings(), 100.0, "ours")


def test_series_keep_sizes_times_and_the_roofline(setting: Setting) -> None:
    points = [(float(n), setting, Workload("toy", "verify", 1, n, 8)) for n in (1, 3)]
    points.append((4.0, setting, Workload("toy", "decode", 2, 1, 8)))
    points.append((5.0, setting, Workload("toy", "prefill", 1, 5)))
    series = measure_series("title", "rows", points, repeats=2)
    assert [row.workload for row in series.rows] == ["vf1@d8", "vf3@d8", "tg1@d8x2", "pp5"]
    assert series.sizes == (1.0, 3.0, 4.0, 5.0) and len(series.growth.measured) == 4
    growth = series.growth
    for row, took, least, read in zip(
        series.rows, growth.measured, growth.roofline, growth.pure, strict=True
    ):
        assert row.runs >= 2 and took > 0 and least > 0 and read > 0
        assert row.share_of_read == pytest.approx((row.gb_s or 0) / SM_80.read_gb_s)
    assert setting.model.lengths == (5,)


def test_steps_are_undone(setting: Setting) -> None:
    measure_series("t", "w", [(1.0, setting, Workload("toy", "verify", 2, 3, 6))], repeats=4)
    assert setting.model.lengths == (6, 6)


def test_first_layers_share_weights_and_leave_the_model_alone() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    shallow = first_layers(model, 2)
    assert len(shallow.layers) == 2 and len(model.layers) == 4  # type: ignore[arg-type]
    assert shallow.layers[0] is model.layers[0]  # type: ignore[index]
    with pytest.raises(ValueError, match="5 layers of a model that has 4"):
        first_layers(model, 5)


def test_pure_reads_come_between_the_runs(setting: Setting) -> None:
    turns: list[int] = []
    samples = measure_workload(setting, Workload("toy", "prefill", 1, 5), 6, lambda: turns.append(0))
    assert len(turns) == ROUNDS and len(samples) >= 6


def series_of(title: str, sizes: tuple[float, ...], measured: tuple[float, ...]) -> Series:
    return Series(title, "rows", sizes, (), Growth(sizes, measured, tuple(1.0 for _ in sizes)))


def test_promises_compare_with_the_smallest_size() -> None:
    rows = series_of("rows of one sequence at once", (1.0, 4.0, 8.0), (1.0, 1.05, 2.0))
    text = promises([rows])
    assert "4 against 1 | 1.05 | 1.30 | 1.10 | aim |" in text
    assert "8 against 1 | 2.00 | 1.60 | 1.20 | short |" in text
    context = series_of("one token, context grows", (64.0, 4096.0), (1.0, 3.3))
    grown = replace(context, growth=replace(context.growth, roofline=(1.0, 3.0)))
    assert "over the roofline | 1.10 | 1.15 | 1.05 | must |" in promises([grown])
    read = replace(context, growth=replace(grown.growth, roofline=(1.0, 2.0), pure=(1.0, 3.2)))
    assert "over the roofline | 1.65 | 1.15 | 1.05 | short |" in promises([read])
    assert "over a pure read of as much | 1.03 | 1.15 | 1.05 | aim |" in promises([read])
    assert promises([series_of("prompt grows", (1.0, 2.0), (1.0, 2.0))]) == ""


def test_table_shows_exponents() -> None:
    text = to_markdown([series_of("prompt grows", (1.0, 2.0), (1.0, 4.0))])
    assert "| prompt grows | rows 1 to 2 | 2.00 | 0.00 | 4.00 |" in text
    assert "| 2 | 4000.000 | 1000.000 | 4.00 | 1000.000 | 4.00 |" in text
