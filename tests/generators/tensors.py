"""Tensors of generated programs: values from a seed, in memory layouts that break kernels which assume too
much."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "offset", "padded")
_MARGIN = (
    5  # elements on either side of an "offset" or "padded" tensor in its storage; odd, so it is not aligned
)


def make_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, low: float, high: float, layout: str = "contiguous"
) -> torch.Tensor:
    """Return a tensor of `shape`, uniform in [low, high] (integers: low <= x < high; bools: either).

    layout: "transposed" swaps the strides of the last two dimensions, "sliced" takes every second element of
    the last from the second on, "expanded" has stride 0 in the first dimension, "offset" lies between NaNs
    (integers: far too large values) in its storage, "padded" between ordinary values. Where the rank is too
    small it is contiguous.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(*sizes: int) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.rand(sizes, generator=generator) < 0.6
        if not dtype.is_floating_point:
            return torch.randint(
                int(low), max(int(high), int(low) + 1), sizes, generator=generator, dtype=dtype
            )
        return (torch.rand(sizes, generator=generator) * (high - low) + low).to(dtype)

    if layout.startswith("blocks:"):
        block_bytes, _, offsets = layout.removeprefix("blocks:").partition(":")
        data = torch.randint(
            0, 256, (*shape[:-1], shape[-1] // int(block_bytes), int(block_bytes)), generator=generator
        )
        blocks = data.to(torch.uint8)
        for offset in map(int, offsets.split(",")):
            scale = torch.rand(blocks.shape[:-1], generator=generator) * (high - low) + low
            blocks[..., offset : offset + 2] = scale.to(torch.float16).unsqueeze(-1).view(torch.uint8)
        return blocks.view(shape)
    if layout == "transposed" and len(shape) >= 2:
        return fill(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "sliced" and len(shape) >= 1:
        return fill(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "expanded" and len(shape) >= 1:
        return fill(1, *shape[1:]).expand(shape)
    if layout in ("offset", "padded"):
        count = torch.Size(shape).numel()
        base = fill(count + 2 * _MARGIN)
        if layout == "offset" and dtype != torch.bool:
            poison = float("nan") if dtype.is_floating_point else 2**40
            base[:_MARGIN], base[_MARGIN + count :] = poison, poison
        return base[_MARGIN : _MARGIN + count].view(shape)
    return fill(*shape)


def overlapping_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that starts one element later in the storage of a "padded" tensor: the two
    overlap."""
    return torch.as_strided(tensor, tensor.size(), tensor.stride(), tensor.storage_offset() + 1)


@dataclass(frozen=True)
class TensorSpec:
    """How to make one input or weight.

    alias: "" for a tensor of its own, "same:x0" for the very tensor of input x0, "overlap:x0" for a view of
    x0's storage that overlaps it (x0 is then "padded").
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    low: float = -2.0
    high: float = 2.0
    layout: str = "contiguous"
    alias: str = ""

    def make(self, made: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor; `made` holds the earlier ones by name."""
        kind, _, name = self.alias.partition(":")
        if kind:
            return made[name] if kind == "same" else overlapping_view(made[name])
        return make_tensor(self.shape, self.dtype, self.seed, self.low, self.high, self.layout)

    def code(self) -> str:
        """Return the Python line that makes this tensor."""
        kind, _, name = self.alias.partition(":")
        if kind:
            return f"{self.name} = {name if kind == 'same' else f'overlapping_view({name})'}"
        values = f"{self.shape}, {self.dtype}, {self.seed}, {self.low!r}, {self.high!r}, {self.layout!r}"
        return f"{self.name} = make_tensor({values})"


def helper_code() -> str:
    """Return the source of the helpers that `TensorSpec.code` calls."""
    return (
        f"_MARGIN = {_MARGIN}\n\n\n{inspect.getsource(make_tensor)}\n\n{inspect.getsource(overlapping_view)}"
    )
