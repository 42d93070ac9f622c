"""Least bytes and operations, against counts by hand and against the loaded models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.roofline import ModelFacts, Work, facts_of, least_work, load_facts
from benchmarks.workloads import Workload

FACTS = ModelFacts("toy", 1000, 100, 600, (None, 3), heads=4, kv_heads=2, head_size=8, causal=True)
ROW = 2 * 2 * 8  # values of one cached position of one layer: key and value, 2 heads of 8


def test_decoding_reads_every_weight_for_every_token() -> None:
    work = least_work(FACTS, Workload("toy", "decode", 1, 4), kv_bytes=2.0)
    seen = (1 + 2 + 3 + 4) + (1 + 2 + 3 + 3)  # full layer, window of 3
    assert work.bytes == 4 * 600 + seen * ROW * 2.0
    assert work.flops == 2 * 4 * 1100 + 4 * 4 * 8 * seen
    assert least_work(FACTS, Workload("toy", "decode", 1, 4), 2.0, 2.0).bytes == 4 * 2200 + seen * ROW * 2.0


def test_depth_adds_what_is_seen() -> None:
    shallow = least_work(FACTS, Workload("toy", "decode", 1, 1), kv_bytes=1.0)
    deep = least_work(FACTS, Workload("toy", "decode", 1, 1, past=100), kv_bytes=1.0)
    assert deep.bytes - shallow.bytes == (100 + 2) * ROW  # the window is full after 3


def test_verified_rows_share_one_reading() -> None:
    one = least_work(FACTS, Workload("toy", "verify", 1, 1, past=10))
    assert one == least_work(FACTS, Workload("toy", "decode", 1, 1, past=10))
    four = least_work(FACTS, Workload("toy", "verify", 1, 4, past=10))
    assert four.bytes == 600 + (14 + 3) * ROW * 4.0
    assert four.flops == least_work(FACTS, Workload("toy", "decode", 1, 4, past=10)).flops


def test_prefill_reads_weights_once_and_has_one_row_of_logits() -> None:
    work = least_work(FACTS, Workload("toy", "prefill", 1, 4))
    assert work.bytes == 600
    assert work.flops == 2 * (4 * 1000 + 100) + 4 * 4 * 8 * (10 + 9)


def test_encoders_see_everything() -> None:
    facts = ModelFacts("toy", 1000, 0, 4000, (None, None), 4, 4, 8, causal=False)
    assert least_work(facts, Workload("toy", "encode", 3, 5)).flops == 3 * (2 * 5 * 1000 + 4 * 4 * 8 * 2 * 25)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(1, 8))
def test_more_is_never_cheaper(length: int, past: int, batch: int) -> None:
    def work(*sizes: int) -> Work:
        return least_work(FACTS, Workload("toy", "decode", sizes[0], sizes[1], sizes[2]))

    base = work(batch, length, past)
    for larger in (
        work(batch + 1, length, past),
        work(batch, length + 1, past),
        work(batch, length, past + 1),
    ):
        assert larger.bytes > base.bytes and larger.flops > base.flops


def test_the_slower_of_the_two_ceilings_decides() -> None:
    assert Work(10e9, 1.0).seconds(read_gb_s=5.0, gflops=100.0) == pytest.approx(2.0)
    assert Work(1.0, 300e9).seconds(read_gb_s=5.0, gflops=100.0) == pytest.approx(3.0)


def test_facts_of_smollm2() -> None:
    facts = load_facts("smollm2")
    assert (facts.heads, facts.kv_heads, facts.head_size, facts.causal) == (9, 3, 64, True)
    assert facts.windows == (None,) * 30
    assert facts.head_weights == 49152 * 576
    per_layer = 576 * 576 * 2 + 2 * 576 * 192 + 3 * 576 * 1536
    assert facts.body_weights == 30 * per_layer
    assert 96e6 < facts.stored_bytes < 97e6  # nearly the whole file, as measured by others


def test_facts_of_minilm() -> None:
    facts = load_facts("minilm")
    assert (facts.heads, facts.head_size, facts.causal, facts.head_weights) == (12, 32, False, 0)
    assert facts.body_weights == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert facts.stored_bytes == 4 * facts.body_weights


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="LlamaConfig"):
        facts_of("x", nn.Linear(1, 1))
