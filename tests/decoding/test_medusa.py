"""Medusa: buffers of the tree, exactness on toys, heads in a file, and heads compiled with the output head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.decoding.strategy_loop import assert_exact, greedy_text, run_text
from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.chance import Dice
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.medusa import (
    CHOICES,
    MedusaHeads,
    MedusaProposer,
    compile_guess,
    fill_tree,
    load_heads,
    save_heads,
)
from torchweld.decoding.step_model import Budget
from torchweld.decoding.tree import depths, leaf_paths, path_to, visible
from torchweld.decoding.warp import Warp
from torchweld.graph.capture import capture
from torchweld.graph.rewrite import Refusal
from torchweld.models.errors import ModelFileError
from torchweld.passes.expose_hidden import expose_hidden


class WithHidden:
    """A toy whose hidden state is the last token, one-hot, behind its logits."""

    def __init__(self, forward: Markov | WholeText) -> None:
        self.forward = forward
        self.vocab_size = 2 * forward.vocab_size

    def __call__(self, ids: Tensor, /) -> Tensor:
        hidden = nn.functional.one_hot(ids, self.forward.vocab_size).float()
        return torch.cat([self.forward(ids), hidden], dim=-1)


def with_hidden(forward: Markov | WholeText) -> HiddenModel:
    return HiddenModel(ToyModel(WithHidden(forward)), forward.vocab_size)  # type: ignore[arg-type]


def right_guess(forward: Markov, heads: int) -> Callable[[Tensor], Tensor]:
    """Heads that know an order-1 Markov model: the most likely tokens behind its most likely next one."""

    def guess(hidden: Tensor) -> Tensor:
        token = int(forward.table[int(hidden.argmax())].argmax())
        rows = []
        for _ in range(heads):
            rows.append(forward.table[token])
            token = int(rows[-1].argmax())
        return torch.stack(rows)

    return guess


def wrong_guess(vocabulary: int, heads: int, seed: int) -> Callable[[Tensor], Tensor]:
    table = torch.randn(vocabulary, heads, vocabulary, generator=torch.Generator().manual_seed(seed))
    return lambda hidden: table[int(hidden.argmax())]


def medusa_buffers(choices: list[tuple[int, ...]]) -> tuple[Tensor, list[int], list[list[int]]]:
    """attn_mask, position_ids and retrieve_indices as the paper's `generate_medusa_buffers` defines them; node 0 is
    the pending token, the others stand in the order of `choices`."""
    count = len(choices) + 1
    mask = torch.eye(count, dtype=torch.bool)
    mask[:, 0] = True
    for row, choice in enumerate(choices, start=1):
        for length in range(1, len(choice)):
            mask[row, 1 + choices.index(choice[:length])] = True
    positions = [0, *(len(choice) for choice in choices)]
    leaves = [c for c in choices if not any(o[: len(c)] == c and o != c for o in choices)]
    retrieve = [
        [0, *(1 + choices.index(leaf[:length]) for length in range(1, len(leaf) + 1))] for leaf in leaves
    ]
    return mask, positions, retrieve


@given(st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8))
def test_buffers_are_those_of_the_paper(some: set[tuple[int, ...]]) -> None:
    choices = sorted({c[:length] for c in some for length in range(1, len(c) + 1)}, key=lambda c: (len(c), c))
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(len(choices)))
    found = fill_tree(choices, logits)
    assert found.parents is not None
    mask, positions, retrieve = medusa_buffers(choices)
    assert torch.equal(visible(found.parents), mask[1:, 1:]) and bool(mask[:, 0].all())
    assert depths(found.parents) == positions[1:]
    assert [[0, *(1 + node for node in path)] for path in leaf_paths(found.parents)] == retrieve
    order = logits.argsort(dim=-1, descending=True)
    assert [order[len(c) - 1, c[-1]].item() for c in choices] == list(found.tokens)


def test_choices_that_do_not_fit_are_left_out_with_all_behind_them() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 4.0]])
    found = fill_tree(((0,), (4,), (4, 0), (0, 1), (0, 1, 0)), logits)
    assert found.tokens == (1, 2)
    assert found.parents == (-1, 0)


@pytest.mark.parametrize("rows", [1, 3, 6, 40])
def test_a_proposal_stays_within_its_budget(rows: int) -> None:
    forward = Markov(5, seed=1)
    model = with_hidden(forward)
    proposer = MedusaProposer(model, right_guess(forward, 3))
    model.prefill([[1, 2]])
    proposer.start([1, 2], Warp(), Dice(0))
    for depth in range(4):
        found = proposer.propose([1, 2, 3], Budget(rows, depth))
        assert len(found.tokens) <= rows
        assert max(depths(found.parents or ()), default=0) <= depth
    assert proposer.row_counts == tuple(range(1, 9))


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(1, 12))
def test_greedy_text_is_the_plain_one(seed: int, length: int, repeats: bool, right: bool, rows: int) -> None:
    forward = Markov(6, order=1, seed=seed) if repeats else WholeText(6, seed=seed)
    guess = right_guess(forward, 3) if right and isinstance(forward, Markov) else wrong_guess(6, 3, seed)
    model = with_hidden(forward)
    text, _ = run_text((model, MedusaProposer(model, guess)), [2, 5, 1], length, rows=rows)
    assert text == greedy_text(forward, [2, 5, 1], length)


@pytest.mark.parametrize(
    "warp", [Warp(do_sample=True), Warp(do_sample=True, top_p=0.8, repetition_penalty=1.4)]
)
@pytest.mark.parametrize("right", [True, False])
def test_sampled_text_has_the_plain_distribution(warp: Warp, right: bool) -> None:
    forward = Markov(3, order=1, seed=2, spread=1.0)
    guess = right_guess(forward, 3) if right else wrong_guess(3, 3, 7)

    def make() -> tuple[HiddenModel, MedusaProposer]:
        model = with_hidden(forward)
        return model, MedusaProposer(model, guess)

    assert_exact(forward, make, [0, 2], 4, warp)


def test_right_heads_give_four_tokens_per_pass() -> None:
    forward = Markov(9, order=1, seed=1)
    model = with_hidden(forward)
    text, statistics = run_text((model, MedusaProposer(model, right_guess(forward, 3))), [3], 41)
    assert text == greedy_text(forward, [3], 41)
    assert statistics.passes == 10


@pytest.mark.parametrize("choices", [(), ((0, 0),), ((0,), (0,)), ((-1,),)])
def test_choices_that_are_no_tree_are_refused(choices: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="choice"):
        MedusaProposer(with_hidden(Markov(3)), wrong_guess(3, 1, 0), choices=choices)


def test_the_order_of_calls_is_checked() -> None:
    model = with_hidden(Markov(3))
    with pytest.raises(RuntimeError, match="before start"):
        MedusaProposer(model, wrong_guess(3, 1, 0)).propose([1], Budget(3, 3))
    with pytest.raises(RuntimeError, match="before the first prefill"):
        model.hidden  # noqa: B018
    with pytest.raises(ValueError, match="no output head"):
        MedusaProposer(model, MedusaHeads(2, 3))
    with pytest.raises(ValueError, match="7 hidden features in rows of 6"):
        HiddenModel(ToyModel(Markov(6)), 7)


def test_heads_survive_a_file(tmp_path: Path) -> None:
    heads = MedusaHeads(2, 5)
    nn.init.normal_(heads.weight)
    nn.init.normal_(heads.bias)
    save_heads(heads, tmp_path / "heads.safetensors")
    again = load_heads(tmp_path / "heads.safetensors")
    assert torch.equal(again.weight, heads.weight) and torch.equal(again.bias, heads.bias)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_heads(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_heads(path)
    save_file({"weight": torch.zeros(2, 3, 4), "bias": torch.zeros(2, 3)}, str(path))
    with pytest.raises(ModelFileError, match=r"weight \[K, d, d\]"):
        load_heads(path)


class Capped(nn.Module):
    """The end of a small language model: a linear output head with a bias, behind it a soft cap."""

    def __init__(self, features: int = 8, vocabulary: int = 11) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, features)
        self.head = nn.Linear(features, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = 2.0 * torch.tanh(self.head(self.words(ids)) / 2.0)
        return logits


@pytest.mark.parametrize("count", [1, 3])
def test_compiled_heads_give_the_numbers_of_torch(count: int) -> None:
    torch.manual_seed(count)
    module = Capped()
    found = expose_hidden(capture(module, (torch.zeros(2, 3, dtype=torch.int64),)))
    assert not isinstance(found, Refusal)
    heads = MedusaHeads(count, 8)
    nn.init.normal_(heads.weight)
    nn.init.normal_(heads.bias)
    guess = compile_guess(found.head, heads)
    hidden = torch.randn(8)
    with torch.no_grad():
        made = torch.stack([heads.state(k, hidden) for k in range(count)])
        expected = 2.0 * torch.tanh(module.head(made) / 2.0)
    torch.testing.assert_close(guess(hidden), expected, rtol=1e-5, atol=1e-5)


def test_heads_of_another_size_are_refused() -> None:
    found = expose_hidden(capture(Capped(), (torch.zeros(2, 3, dtype=torch.int64),)))
    assert not isinstance(found, Refusal)
    with pytest.raises(ModelFileError, match="heads of 5 features; expected 8"):
        compile_guess(found.head, MedusaHeads(2, 5))


def test_paths_of_the_default_choices() -> None:
    tree = fill_tree(CHOICES, torch.eye(3, 9))
    assert tree.parents is not None
    assert [len(path_to(tree.parents, node)) for node in range(len(CHOICES))] == [len(c) for c in CHOICES]
