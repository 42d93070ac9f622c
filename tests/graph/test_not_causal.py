"""Graphs that are not causal, or only in part, are refused at the node that mixes positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.test_sequence import WIDTH, WORDS, refused
from torchweld.graph.capture import capture
from torchweld.graph.rewrite import Refusal, run_pass
from torchweld.graph.sequence import describe_refusal
from torchweld.graph.sequence_rules import analyse_sequence
from torchweld.passes import CANONICALIZE, RECOGNIZE


def expert_choice(m: Any, ids: Tensor, x: Tensor) -> Tensor:
    """Every expert takes the two tokens that suit it best, of the whole sequence."""
    likes = (x @ m.places[:3].T).softmax(-1)
    chosen = likes.topk(2, dim=1).values.amin(1, keepdim=True)
    return x * (likes >= chosen).to(x.dtype).sum(-1, keepdim=True)


def squeeze_and_excite(m: Any, ids: Tensor, x: Tensor) -> Tensor:
    return x * F.adaptive_avg_pool1d(x.transpose(1, 2), 1).sigmoid().transpose(1, 2)


MIXING: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "expert choice": (expert_choice, ("topk",)),
    "mean pooling": (lambda m, ids, x: x + x.mean(1)[:, None], ("mean",)),
    "pooling layer": (squeeze_and_excite, ("avg_pool", "mean")),
    "batch norm of the sequence": (
        lambda m, ids, x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
        ("batch_norm", "instance_norm"),
    ),
    "instance norm": (
        lambda m, ids, x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2),
        ("norm", "reshape"),
    ),
    "group norm": (lambda m, ids, x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2), ("group_norm",)),
    "convolution both ways": (
        lambda m, ids, x: F.conv1d(x.transpose(1, 2), m.kernel, padding=1, groups=WIDTH).transpose(1, 2),
        ("conv1d",),
    ),
    "mixing by a matrix of positions": (
        lambda m, ids, x: (m.places @ m.places.T)[: x.shape[1], : x.shape[1]] @ x,
        ("slice", "matmul"),
    ),
    "fourier": (lambda m, ids, x: torch.fft.fft(x, dim=1).real, ("fft",)),
    "shift from the right": (lambda m, ids, x: x + F.pad(x, (0, 0, 0, 1))[:, 1:], ("pad", "slice")),
}


@pytest.mark.parametrize("name", MIXING)
def test_refused_at_the_node_that_mixes(name: str) -> None:
    mix, ops = MIXING[name]
    refusal = refused(mix)
    assert refusal.node is not None
    assert any(op in str(refusal.node.target) for op in ops), describe_refusal(refusal)
    assert refusal.reason


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[:, None]


def columns(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None, :]


class Masked(nn.Module):
    """One attention with a mask of our choice; `prefix` is known at run time only."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.words = nn.Embedding(WORDS, WIDTH)
        self.register_buffer("prefix", torch.tensor([[3]]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        mask = self.mask(x, self.get_buffer("prefix"))
        y = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask)
        return y[:, 0] @ self.words.weight.T


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (lambda x, prefix: (columns(x) <= rows(x)) | (columns(x) < prefix), "prefix"),
        (lambda x, prefix: columns(x) >= rows(x), "tensor"),
        (lambda x, prefix: (columns(x) - rows(x)).abs() < 3, "tensor"),
        (lambda x, prefix: columns(x) // 4 <= rows(x) // 4, "tensor"),
        (lambda x, prefix: columns(x) != rows(x), "tensor"),
    ],
)
def test_masks_that_show_later_tokens(mask: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    program = capture(Masked(mask).eval(), (torch.arange(14).reshape(2, 7),), verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    found = analyse_sequence(program)
    assert isinstance(found, Refusal) and found.node is not None
    assert "attention without a causal mask" in found.reason
    assert found.node.target is torch.ops.torchweld.attention.default
    assert found.node.meta["mask_name"] == name
    assert "scaled_dot_product_attention" in describe_refusal(found)
