"""Interleaved timing: who is called how often and in which order, and what the ratio means."""

import json
import time

import pytest

from torchweld.optimizer.bench import interleave


def test_calls_alternate_and_warm_up() -> None:
    calls: list[str] = []
    result = interleave(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert result.rounds == 3


def test_ratio_above_one_means_ours_is_faster() -> None:
    result = interleave(lambda: time.sleep(0.001), lambda: time.sleep(0.01), rounds=3, warmup=0)
    assert result.ratio > 2.0
    assert 1.0 <= result.ours.low_ms <= result.ours.median_ms <= result.ours.high_ms
    assert json.loads(result.to_json())["baseline"]["median_ms"] >= 10.0


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        interleave(lambda: None, lambda: None, rounds=0)
