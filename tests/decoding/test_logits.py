"""What decoding reads off logits, against torch's own operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.logits import as_array, likeliest, log_probability, most_likely, softmax

# Few values, so that many are equal.
SCORES = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), min_size=1, max_size=24)


@given(SCORES)
def test_the_first_of_equals_is_the_most_likely(scores: list[float]) -> None:
    assert most_likely(as_array(torch.tensor(scores))) == scores.index(max(scores))


@given(SCORES, st.data())
def test_nan_is_never_the_most_likely(scores: list[float], data: st.DataObject) -> None:
    scores[data.draw(st.integers(0, len(scores) - 1))] = float("nan")
    assert most_likely(as_array(torch.tensor(scores))) is None


@given(SCORES, st.data())
def test_the_likeliest_are_in_order_and_equals_keep_theirs(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]
    assert likeliest(as_array(torch.tensor(scores)), count) == expected


@given(SCORES)
def test_probabilities_are_those_of_torch(scores: list[float]) -> None:
    logits = torch.tensor(scores, dtype=torch.float64)
    torch.testing.assert_close(torch.from_numpy(softmax(as_array(logits))), logits.softmax(0))
    for token in range(len(scores)):
        expected = float(logits.log_softmax(0)[token])
        assert log_probability(logits, token) == pytest.approx(expected, abs=1e-12)


def test_half_precision_is_read_too() -> None:
    assert as_array(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)).tolist() == [1.5, -2.0]
