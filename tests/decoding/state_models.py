"""Small causal language models that carry more than keys and values: convolutions, running values, and scans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, scan
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


class MinimalGRU(nn.Module):
    """minGRU in log space (Feng et al., 2024), by the scan of Heinsen (2023): a product is a sum of logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.into(x).chunk(2, -1)
        log_coefficients = -F.softplus(gate)
        candidate = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        log_values = candidate - F.softplus(-gate)
        so_far = log_coefficients.cumsum(1)
        return x + (so_far + (log_values - so_far).logcumsumexp(1)).exp()


class MinimalLSTM(nn.Module):
    """minLSTM: forget and input gates that sum to 1, both in log space; products of gates spelled as a product, too."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        forget, put, value = self.into(x).transpose(1, 2).chunk(3, 1)
        ratio = F.softplus(-forget) - F.softplus(-put)
        so_far = (-F.softplus(ratio)).cumsum(-1)
        terms = (-F.softplus(-ratio)) + F.logsigmoid(value) - so_far
        decay = torch.sigmoid(forget + 4).cumprod(-1)
        result: Tensor = x + ((so_far + terms.logcumsumexp(-1)).exp() + decay).transpose(1, 2)
        return result


class Extremes(nn.Module):
    """The greatest and least values so far, of floats, tokens and flags, and a learned vector for where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(64, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        values, places = x.cummax(1)
        least = x.transpose(1, 2).cummin(-1).values.transpose(1, 2)
        words, found = (ids % 5).cummin(1)
        flags = (ids > 2).cummin(1).values
        where = self.places(places[..., ::2]).flatten(-2) + self.places(found)[..., :1]
        result: Tensor = x + values - least + where + (words / 4 + flags)[..., None]
        return result


class RecurrentCell(nn.Module):
    """An LSTM as torch's scan of a cell: two carries and a counter, closed-over weights, a learned beginning.

    Run as it is, it is a loop: the oracle does not depend on torch's scan, which is only what torch.export sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.into, self.again = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.first = nn.Parameter(torch.randn(WIDTH))

    def cell(
        self, carry: tuple[Tensor, Tensor, Tensor], row: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The next carry, and the result of a row."""
        hidden, memory, count = carry
        put, forget, new, out = (row + self.again(hidden)).chunk(4, -1)
        memory = torch.sigmoid(forget) * memory + torch.sigmoid(put) * torch.tanh(new)
        hidden = torch.sigmoid(out) * torch.tanh(memory)
        return (hidden, memory, count + 1), hidden / (count + 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.into(x)
        zero = torch.zeros_like(x[:, 0])
        carry = self.first.expand(x.shape[0], WIDTH), zero, torch.zeros(x.shape[0], 1, dtype=torch.int64)
        if torch.compiler.is_exporting():
            _, found = scan(self.cell, tuple(part.clone() for part in carry), rows, dim=1)
            return x + found
        results = []
        for row in rows.unbind(1):
            carry, result = self.cell(carry, row)
            results.append(result)
        return x + torch.stack(results, 1)


class LinearRecurrence(nn.Module):
    """h[t] = a[t] h[t - 1] + b[t] as an associative scan of pairs; as it is, a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.into(x).chunk(2, -1)
        gate = torch.sigmoid(gate)
        if torch.compiler.is_exporting():
            pairs = gate, value
            _, found = associative_scan(_follow, pairs, dim=1, combine_mode="generic")
            return x + found
        results = [value[:, 0]]
        for place in range(1, x.shape[1]):
            results.append(gate[:, place] * results[-1] + value[:, place])
        return x + torch.stack(results, 1)


def _follow(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One step of a linear recurrence after another."""
    return left[0] * right[0], left[1] * right[0] + right[1]


READ_TOKENS = (CumulativeMean, Extremes)
"""Layers that read the tokens beside their vectors."""


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
            x = layer(x, ids) if isinstance(layer, READ_TOKENS) else layer(x)
        return F.linear(self.norm(x), self.words.weight)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "short": lambda: [ShortConvolution(), Attention(), PaddedConvolution(2, 1, WIDTH, 2)],
    "wide": lambda: [PaddedConvolution(3, 2, 1), PaddedConvolution(3, 1, 3), PaddedConvolution(11, 1, WIDTH)],
    "mean": lambda: [Attention(), CumulativeMean()],
    "running": lambda: [MinimalGRU(), Extremes(), MinimalLSTM()],
    "scan": lambda: [RecurrentCell(), Attention(), LinearRecurrence()],
}
"""By name: LFM2's mix; no attention, and more taps than are spelled out; running sums of floats and of integers; scans
in log space, and extremes; torch's scans beside attention."""


def state_model(kind: str) -> StateModel:
    """One of `LAYERS`, with fixed weights."""
    return StateModel(LAYERS[kind]).eval()
