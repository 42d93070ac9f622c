"""expose_hidden: the last hidden state beside the logits, the head that was cut out, and every refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.support import check_metas
from tests.zoo import ZOO
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.expose_hidden import Exposed, expose_hidden

IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
SOME = ("gemma2", "gpt2")  # a soft cap; a linear made of [in, out] weights


def canonical(model: nn.Module) -> Program:
    program = capture(model.eval(), (IDS,), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return program


def exposed_of(model: nn.Module) -> Exposed:
    found = expose_hidden(canonical(model))
    assert not isinstance(found, Refusal), found.reason
    return found


def refusal_of(model: nn.Module) -> Refusal:
    found = expose_hidden(canonical(model))
    assert isinstance(found, Refusal)
    return found


class Words(nn.Module):
    """Embedding, then `tail` of the hidden states; the base of all cases."""

    def __init__(self, features: int = 6, vocabulary: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(vocabulary, features)
        self.head = nn.Linear(features, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tail(torch.tanh(self.words(ids)), ids)

    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits


class SoftCap(Words):
    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return 3.0 * torch.tanh(self.head(hidden) / 3.0)


class Tied(Words):
    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden @ self.words.weight.T


class HalfHead(Words):
    """A head in bfloat16 whose logits are cast to float32: the hidden state is cast to what the logits are."""

    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return F.linear(hidden.bfloat16(), self.head.weight.bfloat16()).float()


class Sized(Words):
    """Logits divided by the length: the head needs a size, which its hidden state has."""

    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden) / ids.shape[1]
        return logits


@pytest.mark.parametrize("case", [Words, SoftCap, Tied, HalfHead, Sized])
def test_logits_and_hidden_state_come_out(case: type[Words]) -> None:
    model = case()
    found = exposed_of(model)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    rows = found.program.run(ids)
    assert isinstance(rows, Tensor) and rows.shape == (3, 3, 16)
    assert (found.vocabulary, found.features) == (10, 6)
    with torch.no_grad():
        expected, state = model(ids), torch.tanh(model.words(ids))
    assert torch.equal(rows[..., :10], expected)
    kept = state.bfloat16().float() if case is HalfHead else state
    assert torch.equal(rows[..., 10:], kept)
    given = state.bfloat16() if case is HalfHead else state
    assert torch.equal(found.head.run(given), expected)  # type: ignore[arg-type]
    check_metas(found.program.graph_module, (IDS,))
    check_metas(found.head.graph_module, (given,))


@pytest.mark.parametrize("name", SOME)
def test_real_architectures_have_a_head(name: str) -> None:
    class LogitsOf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ZOO[name].make()

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids, use_cache=False).logits
            return logits

    program = canonical(LogitsOf())
    before = program.run(IDS)
    found = expose_hidden(program)
    assert not isinstance(found, Refusal), found.reason
    rows = found.program.run(IDS)
    assert isinstance(rows, Tensor) and isinstance(before, Tensor)
    assert torch.equal(rows[..., : found.vocabulary], before)
    assert torch.equal(found.head.run(rows[..., found.vocabulary :]), before)  # type: ignore[arg-type]


def test_the_program_stays_as_it_is() -> None:
    program = canonical(Words())
    before = str(program.graph)
    expose_hidden(program)
    assert str(program.graph) == before


class TwoHeads(Words):
    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden) + F.linear(hidden, self.words.weight)
        return logits


class NoHead(Words):
    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return hidden.exp()


class Gathered(Words):
    """Logits that add something of the tokens themselves behind the linear."""

    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden) + ids.unsqueeze(-1)
        return logits


class Flat(Words):
    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden.flatten(1)[:, :6])
        return logits


class Both(Words):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.words(ids)
        return self.head(hidden), hidden


class MovingWeight(Words):
    def tail(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return F.linear(hidden, self.words.weight + hidden.mean())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (TwoHeads, "made of 2 values that depend on the tokens"),
        (Gathered, "made of 2 values that depend on the tokens"),
        (NoHead, "made of 0 values that depend on the tokens"),
        (Flat, r"expected \[B, S, d\] -> \[B, S, V\]"),
        (Both, "the graph returns 2"),
        (MovingWeight, "depend on the tokens"),
    ],
)
def test_what_has_no_head_is_refused(case: type[Words], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refusal_of(case()).reason)
