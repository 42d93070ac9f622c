"""Padding that reaches no result is proved so; every way for it to reach one is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchweld.graph.capture import capture
from torchweld.graph.padding import Padding, check_padding
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE

IDS = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


class Tiny(nn.Module):
    """A sentence encoder of one layer, whose end is `finish(hidden [B, S, 8], mask [B, S])`."""

    def __init__(
        self, finish: Callable[[Tensor, Tensor], Tensor], masked: bool = True, places: int = 16
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(places, 8)
        self.norm, self.project = nn.LayerNorm(8), nn.Linear(8, 8)
        self.finish, self.masked = finish, masked

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [B, S] twice."""
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        heads = self.project(x).view(*ids.shape, 2, 4).transpose(1, 2)
        visible = attention_mask.bool()[:, None, None, :] if self.masked else None
        y = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=visible)
        return self.finish(x + y.transpose(1, 2).flatten(2), attention_mask)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    weight = mask[:, :, None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def found(model: nn.Module) -> Padding | Refusal:
    program = capture(model.eval(), (IDS, MASK), {}, dynamic=True, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    return check_padding(program)


@pytest.mark.parametrize(
    "finish",
    [masked_mean, lambda x, mask: x[:, 0], lambda x, mask: F.normalize(masked_mean(x, mask), dim=-1)],
)
def test_masked_mean_and_first_position_are_proved(finish: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Tiny(finish).eval()
    assert found(model) == Padding(mask=1, cut=(0, 1))
    whole, short = model(IDS, MASK)[1:], model(IDS[1:, :4], MASK[1:, :4])
    torch.testing.assert_close(whole, short)


@pytest.mark.parametrize(
    ("finish", "said"),
    [
        (lambda x, mask: x, "an output has places for padding"),
        (lambda x, mask: x.sum(1), "it sums over positions, padding among them"),
        (lambda x, mask: (x * (1 - mask[:, :, None])).sum(1), "it sums over positions, padding among them"),
        (lambda x, mask: x.mean(1), "no rule for"),
        (lambda x, mask: x[:, 1], "it takes another position than the first"),
        (lambda x, mask: x[:, -1], "it takes another position than the first"),
        (lambda x, mask: masked_mean(x, mask) * x.shape[1], "it computes with a size"),
        (lambda x, mask: masked_mean(x, mask) / x.shape[0], "it computes with a size"),
        (lambda x, mask: masked_mean(x, mask) + (x * mask[:, :, None]).sum((0, 1)), "it sums over the batch"),
        (lambda x, mask: masked_mean(x, mask) + masked_mean(x, mask)[0], "it takes one sentence"),
        (lambda x, mask: masked_mean(x.cumsum(1), mask), "no rule for"),
        (lambda x, mask: masked_mean(x.flip(1), mask), "no rule for"),
        (lambda x, mask: x.norm(dim=1), "it is a norm over batch or length"),
        (lambda x, mask: masked_mean(x, mask.ne(2)), "it compares with something else than 0"),
        (lambda x, mask: masked_mean(F.gelu(x.reshape(-1, 8)).reshape(x.shape), mask), "an axis of"),
        (lambda x, mask: masked_mean(x.reshape(*mask.t().shape, 8).transpose(0, 1), mask), "moves"),
        (lambda x, mask: (x @ x.transpose(1, 2)).sum(2), "two axes of one size"),
        (lambda x, mask: masked_mean(x, mask).t() @ masked_mean(x, mask), "no rule for"),
    ],
)
def test_every_way_to_the_result_is_refused(finish: Callable[[Tensor, Tensor], Tensor], said: str) -> None:
    problem = found(Tiny(finish))
    assert isinstance(problem, Refusal) and said in problem.reason, problem
    assert problem.node is not None


def test_attention_that_sees_padding_is_refused() -> None:
    problem = found(Tiny(masked_mean, masked=False))
    assert isinstance(problem, Refusal) and problem.reason == "nothing hides padded keys"


def test_a_program_without_a_mask_is_refused() -> None:
    program = capture(nn.Linear(8, 8).eval(), (torch.randn(3, 8),), {}, dynamic=True)
    problem = check_padding(program)
    assert isinstance(problem, Refusal) and problem.reason == "no input is called attention_mask"


def test_fixed_sizes_are_refused() -> None:
    program = capture(Tiny(masked_mean).eval(), (IDS, MASK), {}, dynamic=False)
    problem = check_padding(program)
    assert isinstance(problem, Refusal)
    assert problem.reason == "batch and length of the mask are not two symbols"
