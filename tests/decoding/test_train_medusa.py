"""Training of Medusa heads: what is recorded, what is learned, and that only the heads change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.decoding.strategy_loop import greedy_text, run_text
from tests.decoding.toy_models import Markov, ToyModel
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.medusa import MedusaHeads, MedusaProposer, compile_guess
from torchweld.decoding.train_medusa import Trace, fixed_head, record, train_heads
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.passes.expose_hidden import expose_hidden

VOCABULARY, FEATURES = 12, 16


class Tail(nn.Module):
    """The end of a model whose next token follows from the last one: one-hot-like states, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.words = nn.Embedding(VOCABULARY, FEATURES)
        with torch.no_grad():
            self.words.weight.copy_(torch.randn(VOCABULARY, FEATURES, generator=generator))
        following = torch.randperm(VOCABULARY, generator=generator)
        weight = torch.zeros(VOCABULARY, FEATURES)
        weight[following] = 2.0 * self.words.weight.detach()
        self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)
        self.head.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.words(ids))
        return logits


class Rows(Markov):
    """Logits and hidden state of the tail in one row, as an exposed program gives them."""

    def __init__(self, program: Program) -> None:
        self.vocab_size = VOCABULARY + FEATURES
        self.program = program

    def __call__(self, ids: Tensor, /) -> Tensor:
        rows = self.program.run(ids)
        assert isinstance(rows, Tensor)
        return rows


@pytest.fixture(scope="module")
def model() -> HiddenModel:
    found = expose_hidden(capture(Tail(), (torch.zeros(2, 3, dtype=torch.int64),), verify=False))
    assert not isinstance(found, Refusal)
    return HiddenModel(ToyModel(Rows(found.program)), FEATURES, found.head)


def test_states_and_tokens_belong_together(model: HiddenModel) -> None:
    prompts = [[first, second] for first in range(3) for second in range(4)]
    traces = record(model, prompts, tokens=5, batch=5)
    tail = Tail()
    for prompt, trace in zip(prompts, traces, strict=True):
        before = [prompt[-1], *trace.tokens.tolist()][:-1]
        assert torch.equal(trace.hidden, tail.words.weight[before].detach())
        assert torch.equal(trace.tokens, tail(torch.tensor([before]))[0].argmax(-1))


def test_a_trace_ends_before_the_end_of_the_text(model: HiddenModel) -> None:
    (whole,) = record(model, [[4]], tokens=6)
    end = int(whole.tokens[3])
    (cut,) = record(model, [[4]], tokens=6, eos=(end,))
    assert cut.tokens.tolist() == whole.tokens.tolist()[: whole.tokens.tolist().index(end)]
    assert len(cut.hidden) == len(cut.tokens)


def test_heads_learn_what_follows(model: HiddenModel) -> None:
    head = model.head
    assert head is not None
    traces = record(model, [[token] for token in range(VOCABULARY)] * 4, tokens=20)
    steps: list[float] = []
    heads, fits = train_heads(
        traces, head, count=2, epochs=120, rows=128, rate=0.02, on_step=lambda _, loss: steps.append(loss)
    )
    assert steps[-1] < 0.5 * steps[0]
    assert min(fit.accuracy for fit in fits) > 0.9, "twelve states lead to twelve tokens; chance is 1/12"
    again, _ = train_heads(traces, head, count=2, epochs=120, rows=128, rate=0.02)
    assert torch.equal(heads.weight, again.weight), "equal arguments give equal heads"

    text, statistics = run_text((model, MedusaProposer(model, heads)), [5], 31)
    assert text == greedy_text(Tail(), [5], 31)  # type: ignore[arg-type]
    assert statistics.passes <= 15, "two right heads give three tokens per pass, plain decoding takes 30"


def test_zero_heads_guess_what_the_model_says(model: HiddenModel) -> None:
    head = model.head
    assert head is not None
    hidden = torch.randn(FEATURES)
    guess = compile_guess(head, MedusaHeads(2, FEATURES))(hidden)
    expected = Tail().head(hidden).detach()
    torch.testing.assert_close(guess, expected.expand(2, -1), rtol=1e-5, atol=1e-5)


def test_the_fixed_head_lets_gradients_through_and_keeps_its_weight(model: HiddenModel) -> None:
    head = model.head
    assert head is not None
    logits_of = fixed_head(head)
    hidden = torch.randn(1, 4, FEATURES, requires_grad=True)
    weights = [tensor.clone() for tensor in head.graph_module.state_dict().values()]
    logits_of(hidden).square().sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and bool(hidden.grad.abs().sum() > 0)
    torch.testing.assert_close(logits_of(hidden).detach(), Tail().head(hidden).detach())
    for before, after in zip(weights, head.graph_module.state_dict().values(), strict=True):
        assert torch.equal(before, after) and after.grad is None


def test_short_traces_are_refused(model: HiddenModel) -> None:
    head = model.head
    assert head is not None
    short = Trace(torch.zeros(2, FEATURES), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no trace is longer than 2 tokens"):
        train_heads([short], head, count=2)
    with pytest.raises(ValueError, match="1 states with 1 tokens behind them"):
        train_heads([short], head, count=1)
