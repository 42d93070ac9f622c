"""Small causal language models that carry more than keys and values: convolutions of many kinds, and running sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, WIDTH, HEADS = 23, 12, 2


class Attention(nn.Module):
    """Causal attention with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + mixed.permute(0, 2, 1, 3).reshape(batch, length, WIDTH)


class ShortConvolution(nn.Module):
    """The gated short convolution of LFM2 and Hyena: padded on both sides, what is behind is cut off."""

    def __init__(self, taps: int = 3) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, taps, groups=WIDTH, padding=taps - 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, after, value = self.into(x).transpose(1, 2).chunk(3, 1)
        mixed: Tensor = self.conv(gate * value)[..., : x.shape[1]]
        result: Tensor = x + self.out((after * mixed).transpose(1, 2))
        return result


class PaddedConvolution(nn.Module):
    """A convolution behind zeros: over all channels, in groups, dilated, with several results per channel."""

    def __init__(self, taps: int, dilation: int, groups: int, times: int = 1) -> None:
        super().__init__()
        self.behind = (taps - 1) * dilation
        self.conv = nn.Conv1d(WIDTH, WIDTH * times, taps, dilation=dilation, groups=groups)
        self.out = nn.Linear(WIDTH * times, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv(F.pad(x.transpose(1, 2), (self.behind, 0)))
        result: Tensor = x + self.out(F.silu(mixed).transpose(1, 2))
        return result


class CumulativeMean(nn.Module):
    """The mean of everything so far, and a learned vector for how many tokens were even so far."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = nn.Embedding(64, WIDTH)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        places = torch.arange(1, x.shape[1] + 1)
        mean = x.cumsum(1) / places[None, :, None]
        result: Tensor = x + mean + self.counts((ids % 2 == 0).cumsum(1))
        return result


class StateModel(nn.Module):
    """Embedding, some layers, a norm, and the embedding as the head."""

    def __init__(self, layers: Callable[[], list[nn.Module]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(layers())
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, ids) if isinstance(layer, CumulativeMean) else layer(x)
        return F.linear(self.norm(x), self.words.weight)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "short": lambda: [ShortConvolution(), Attention(), PaddedConvolution(2, 1, WIDTH, 2)],
    "wide": lambda: [PaddedConvolution(3, 2, 1), PaddedConvolution(3, 1, 3), PaddedConvolution(11, 1, WIDTH)],
    "mean": lambda: [Attention(), CumulativeMean()],
}
"""By name: LFM2's mix; no attention, and more taps than are spelled out; running sums of floats and of integers."""


def state_model(kind: str) -> StateModel:
    """One of `LAYERS`, with fixed weights."""
    return StateModel(LAYERS[kind]).eval()
