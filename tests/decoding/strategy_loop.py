"""Run the speculative loop on toy models: greedy texts, and exact distributions by enumeration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.decoding.enumerate_chance import exact_distribution
from tests.decoding.toy_models import Markov, WholeText
from torchweld.decoding.chance import Chance, Dice
from torchweld.decoding.request import Request
from torchweld.decoding.speculative import Constant, speculate
from torchweld.decoding.statistics import PassLog, Statistics
from torchweld.decoding.step_model import Proposer, StepModel
from torchweld.decoding.warp import Warp

Text = tuple[int, ...]
Made = tuple[StepModel, Proposer]


def run_text(
    made: Made,
    prompt: Sequence[int],
    length: int,
    *,
    warp: Warp | None = None,
    chance: Chance | None = None,
    rows: int = 64,
) -> tuple[Text, Statistics]:
    """`length` tokens behind the prompt; afterwards the model has cached all of the text but its last token."""
    model, proposer = made
    log = PassLog()
    request = Request(tuple(prompt), length, warp=warp or Warp())
    loop = speculate(model, request, proposer, policy=Constant(rows), chance=chance or Dice(0), log=log)
    text = tuple(given.token for given in loop)
    assert model.lengths == (len(prompt) + len(text) - 1,)
    return text, log.freeze(len(text))


def greedy_text(model: Markov | WholeText, prompt: Sequence[int], length: int) -> Text:
    """What plain greedy decoding by recomputation gives."""
    text = list(prompt)
    for _ in range(length):
        row = model(torch.tensor([text]))[0, -1]
        text.append(int((row == row.max()).nonzero()[0]))
    return tuple(text[len(prompt) :])


def assert_exact(
    model: Markov | WholeText, make: Callable[[], Made], prompt: Sequence[int], length: int, warp: Warp
) -> None:
    """The text has plain decoding's distribution to 1e-12, summed over every way that chance may go."""
    got = exact_distribution(lambda chance: run_text(make(), prompt, length, warp=warp, chance=chance)[0])
    expected: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        longer: dict[Text, float] = defaultdict(float)
        for text, weight in expected.items():
            whole = [*prompt, *text]
            row = warp.distribution(model(torch.tensor([whole]))[0, -1], whole)
            for token, p in enumerate(row.tolist()):
                if p > 0.0:
                    longer[(*text, token)] += weight * p
        expected = longer
    assert sum(got.values()) == pytest.approx(1.0, abs=1e-12)
    for text in got.keys() | expected.keys():
        assert got.get(text, 0.0) == pytest.approx(expected.get(text, 0.0), abs=1e-12), text
