"""The model that compares bits: it knows behind which text every row stands, and sees one changed bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scripts.planted_trees import PlantedTrees
from scripts.watched_model import BitsDiffer, Text, WatchedModel
from tests.decoding.toy_models import ToyModel, WholeText
from torchweld.decoding.accept import check_proposal
from torchweld.decoding.generate import generate, generate_batch
from torchweld.decoding.step_model import Budget, LogitsFor

FORWARD = WholeText(11)


class Wrong(ToyModel):
    """One bit of one logit is another one, in the row that feeds `token` as row `row` of a pass."""

    def __init__(self, row: int, token: int) -> None:
        super().__init__(FORWARD)
        self.row, self.token = row, token

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        logits = super().step(ids, counts=counts, parents=parents, logits_for="all").clone()
        if self.row < ids.shape[1] and ids[0, self.row] == self.token:
            logits[0, self.row, 3] = torch.nextafter(logits[0, self.row, 3], torch.tensor(torch.inf))
        rows = [ids.shape[1] - 1] if logits_for == "last" else list(range(ids.shape[1]))
        return logits[:, rows if isinstance(logits_for, str) else list(logits_for)]


def plain(known: dict[Text, bytes], length: int = 40) -> tuple[int, ...]:
    return generate(WatchedModel(ToyModel(FORWARD), known, record=True), [1, 2], max_new_tokens=length).tokens


@given(st.integers(0, 99))
def test_every_row_of_the_text_is_compared(seed: int) -> None:
    known: dict[Text, bytes] = {}
    text = plain(known)
    assert len(known) == len(text)
    watched = WatchedModel(ToyModel(FORWARD), known)
    trees = PlantedTrees((1, 2, *text), 11, seed=seed)
    found = generate(
        watched, [1, 2], max_new_tokens=40, proposer=trees, num_assistant_tokens_schedule="constant"
    )
    assert found.tokens == text and found.statistics.accepted > 0
    assert watched.compared >= 40
    watched.step(torch.tensor([[text[-1]]]))  # behind a text that nobody knows
    assert watched.compared >= 40 and len(known) == 40


@pytest.mark.parametrize("row", [0, 1])
def test_one_other_bit_is_seen(row: int) -> None:
    known: dict[Text, bytes] = {}
    text = plain(known)
    places = []
    for token in set(text):
        watched = WatchedModel(Wrong(row, token), known)
        trees = PlantedTrees((1, 2, *text), 11)
        try:
            generate(
                watched, [1, 2], max_new_tokens=40, proposer=trees, num_assistant_tokens_schedule="constant"
            )
        except BitsDiffer as difference:
            places.append(len(difference.text))
            assert difference.text == (1, 2, *text)[: places[-1]] and difference.text[-1] == token
    assert len(set(places)) >= 3, "a right guess stood in that row for several tokens"


def test_a_batch_is_compared_text_by_text() -> None:
    known: dict[Text, bytes] = {}
    prompts = ([1, 2], [5], [3, 3, 3])
    alone = [
        generate(WatchedModel(ToyModel(FORWARD), known, record=True), prompt, max_new_tokens=9)
        for prompt in prompts
    ]
    watched = WatchedModel(ToyModel(FORWARD), known)
    together = generate_batch(watched, prompts, max_new_tokens=9)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert watched.compared == len(known) == 27


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 9), st.integers(0, 8))
def test_planted_trees_keep_the_contract_and_hold_the_text(
    seed: int, rows: int, depth: int, left: int
) -> None:
    text = tuple(range(10, 10 + left + 1))
    trees = PlantedTrees(text, 30, seed=seed)
    budget = Budget(rows, depth)
    for _ in range(10):
        proposal = trees.propose(text[:1], budget)
        check_proposal(proposal, budget, 30, "trees")
        assert len(proposal.tokens) <= trees.row_counts[-1]
