"""Greedy decoding against what it is defined to be, on models small enough to know the answer."""

import itertools

import pytest
import torch
from torch import Tensor

from torchweld.decoding.greedy import DecodingError, generate, next_token

VOCABULARY = 11


def successor(ids: Tensor) -> Tensor:
    """A model that always predicts the last token plus one."""
    return torch.nn.functional.one_hot((ids + 1) % VOCABULARY, VOCABULARY).float()


def prompt(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


def test_counts_up() -> None:
    assert list(generate(successor, prompt(3), 4)) == [4, 5, 6, 7]


def test_stops_before_the_end_token() -> None:
    assert list(generate(successor, prompt(3), 100, eos=(6, 9))) == [4, 5]


def test_tokens_come_one_by_one_and_the_prompt_stays() -> None:
    lengths: list[int] = []
    ids = prompt(0, 1)

    def model(seen: Tensor) -> Tensor:
        lengths.append(seen.shape[1])
        return successor(seen)

    assert list(itertools.islice(generate(model, ids, 100), 3)) == [2, 3, 4]
    assert lengths == [2, 3, 4]
    assert ids.tolist() == [[0, 1]]


def test_sees_the_whole_sequence() -> None:
    torch.manual_seed(0)
    embed = torch.randn(VOCABULARY, 8)

    def model(ids: Tensor) -> Tensor:
        return embed[ids].cumsum(1).tanh() @ embed.T

    expected = prompt(1, 2)
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert list(generate(model, prompt(1, 2), 6)) == expected[0, 2:].tolist()


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(VOCABULARY, requires_grad=True)
    states: list[bool] = []

    def model(ids: Tensor) -> Tensor:
        logits = successor(ids) * weight
        states.append(logits.requires_grad)
        return logits

    list(generate(model, prompt(0), 2))
    assert states == [False, False]


def test_ties_go_to_the_lowest_token() -> None:
    assert next_token(torch.tensor([[[1.0, 3.0, 3.0, 2.0]]]), 1) == 1


def test_minus_infinity_is_allowed_and_last_position_counts() -> None:
    logits = torch.tensor([[[9.0, 0.0], [-torch.inf, 0.0]]])
    assert next_token(logits, 2) == 1
    assert next_token(logits[:, -1:], 2) == 1


@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 3)]
)
def test_prompts_of_another_shape_are_refused(ids: Tensor) -> None:
    with pytest.raises(DecodingError, match=r"expected int64 \[1, S\]"):
        next(generate(successor, ids, 1))


@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 5), (1, 2, 5), (1, 3, 0)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DecodingError, match=r"expected logits \[1, 3, V\]"):
        next_token(torch.zeros(shape), 3)


def test_nan_is_refused() -> None:
    with pytest.raises(DecodingError, match="after position 2 hold NaN"):
        next_token(torch.tensor([[[0.0, torch.nan, 9.0]]]), 3)
