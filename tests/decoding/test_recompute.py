"""The StepModel without a cache: what the protocol promises, on models whose logits are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.toy_models import WholeText
from torchweld.decoding.cache import CacheError
from torchweld.decoding.recompute import RecomputeModel
from torchweld.decoding.step_model import DecodingError

FORWARD = WholeText(6, 1)


def behind(text: list[int]) -> torch.Tensor:
    return FORWARD(torch.tensor([text]))[0, -1]


def model(*prompts: list[int], max_length: int | None = None) -> RecomputeModel:
    made = RecomputeModel(FORWARD, 6, max_length)
    if prompts:
        made.prefill(prompts)
    return made


def test_prefill_gives_the_last_row_of_each_prompt() -> None:
    made = model()
    logits = made.prefill([[1, 2, 3], [4]])
    assert torch.equal(logits, torch.stack([behind([1, 2, 3]), behind([4])]))
    assert made.lengths == (3, 1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ragged_steps_and_rollbacks(data: st.DataObject) -> None:
    token = st.integers(0, 5)
    texts = [data.draw(st.lists(token, min_size=1, max_size=4)) for _ in range(data.draw(st.integers(1, 3)))]
    made = model(*texts)
    for _ in range(3):
        count = data.draw(st.integers(1, 3))
        counts = [data.draw(st.integers(0, count)) for _ in texts]
        rows = [[data.draw(token) for _ in range(count)] for _ in texts]
        logits = made.step(torch.tensor(rows), counts=counts, logits_for="all")
        assert logits.shape == (len(texts), count, 6)
        for number, real in enumerate(counts):
            for place in range(real):
                assert torch.equal(logits[number, place], behind(texts[number] + rows[number][: place + 1]))
        texts = [text + row[:real] for text, row, real in zip(texts, rows, counts, strict=True)]
        wanted = [data.draw(st.integers(1, len(text))) for text in texts]
        assert made.truncate(wanted) == tuple(len(t) - w for t, w in zip(texts, wanted, strict=True))
        texts = [text[:wish] for text, wish in zip(texts, wanted, strict=True)]
        assert made.lengths == tuple(map(len, texts))


def test_trees_are_their_paths() -> None:
    made = model([1, 2])
    logits = made.step(torch.tensor([[3, 4, 5, 0]]), parents=[-1, 0, 0, 2], logits_for=[1, 3])
    assert torch.equal(logits[0], torch.stack([behind([1, 2, 3, 4]), behind([1, 2, 3, 5, 0])]))
    assert made.lengths == (6,)
    with pytest.raises(CacheError, match="the last step was a tree"):
        made.step(torch.tensor([[1]]))
    with pytest.raises(CacheError, match="no path from the root: row 3 does not follow row 0"):
        made.keep([0, 3])
    with pytest.raises(CacheError, match="inside a tree"):
        made.truncate(4)
    made.keep([0, 2, 3])
    assert made.lengths == (5,)
    assert torch.equal(made.step(torch.tensor([[2]]))[0, 0], behind([1, 2, 3, 5, 0, 2]))
    with pytest.raises(CacheError, match="there is no tree"):
        made.keep([0])
    made.step(torch.tensor([[1, 1]]), parents=[-1, -1])
    assert made.truncate(6) == (2,)
    assert torch.equal(made.step(torch.tensor([[4]]))[0, 0], behind([1, 2, 3, 5, 0, 2, 4]))


def test_errors_leave_it_as_it_was() -> None:
    made = model([1, 2], [3], max_length=4)
    bad: list[tuple[type[Exception], object]] = [
        (DecodingError, lambda: made.step(torch.zeros(2, 0, dtype=torch.int64))),
        (DecodingError, lambda: made.step(torch.zeros(2, 1))),
        (CacheError, lambda: made.step(torch.zeros(1, 1, dtype=torch.int64))),
        (CacheError, lambda: made.step(torch.zeros(2, 3, dtype=torch.int64))),
        (CacheError, lambda: made.step(torch.zeros(2, 1, dtype=torch.int64), counts=[2, 0])),
        (CacheError, lambda: made.step(torch.zeros(2, 1, dtype=torch.int64), parents=[-1])),
        (IndexError, lambda: made.step(torch.tensor([[1], [6]]))),
        (CacheError, lambda: made.truncate(2)),
        (CacheError, lambda: made.truncate([1])),
        (DecodingError, lambda: made.prefill([[1], []])),
        (DecodingError, lambda: made.prefill([])),
        (IndexError, lambda: made.prefill([[-1]])),
        (CacheError, lambda: made.prefill([[1] * 5])),
    ]
    for kind, call in bad:
        with pytest.raises(kind):
            call()  # type: ignore[operator]
        assert made.lengths == (2, 1)
    assert torch.equal(
        made.step(torch.tensor([[3], [4]]))[:, 0], torch.stack([behind([1, 2, 3]), behind([3, 4])])
    )


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(DecodingError, match=r"gave logits \(1, 2, 6\); expected \(1, 2, 7\)"):
        RecomputeModel(FORWARD, 7).prefill([[1, 2]])
