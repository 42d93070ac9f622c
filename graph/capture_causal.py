"""Capture a causal language model as ids [B, S] -> logits, whatever else its forward takes and gives.

    program = capture_causal(hugging_face_model)
    program = capture_causal(my_module, torch.tensor([[3, 1, 4], [1, 5, 9]]))

A Hugging Face model runs without its own cache and without an attention mask, which means that every token counts. An
encoder-decoder takes the mask of its source like any other input: give it in the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from torchweld.graph.capture import capture
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.program import Program

DECODER_TOKENS: Final = "decoder_input_ids"
"""How Hugging Face calls the tokens of a decoder that has an encoder."""
OWN_CACHE: Final = "use_cache"
"""How it calls the switch of its own cache."""

Example = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]


def capture_causal(model: nn.Module, example: Example | None = None, *, verify: bool = True) -> Program:
    """The program of `model` over tokens alone, or over the tokens of a decoder and what its encoder reads.

    example: int64 [B, S] ids that it accepts, or its inputs by name or in their order, those of a decoder and an
    encoder of different lengths; made up without it.  verify: as for `capture`.  Raises CaptureError.
    """
    names = inspect.signature(model.forward).parameters
    if isinstance(example, tuple):
        named = _by_name(model, example)
        if named is None or not {OWN_CACHE, DECODER_TOKENS} & set(names):
            return capture(model, example, verify=verify)
        example = named
    if isinstance(example, Mapping) or DECODER_TOKENS in names:
        keywords: dict[str, object] = _encoder_decoder_inputs(model, example)
    elif "input_ids" in names:
        keywords = {"input_ids": _made_up(7) if example is None else example}
    else:
        return capture(model, (_made_up(7) if example is None else example,), verify=verify)
    if OWN_CACHE in names:
        keywords[OWN_CACHE] = False
    return capture(model, (), keywords, verify=verify)


def _by_name(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Tensor] | None:
    """Positional inputs by the names that `forward` gives them; None where it does not name them all."""
    try:
        given = inspect.signature(model.forward).bind(*example).arguments
    except TypeError:
        return None
    return given if all(isinstance(value, Tensor) for value in given.values()) else None


def _encoder_decoder_inputs(
    model: nn.Module, example: Tensor | Mapping[str, Tensor] | None
) -> dict[str, object]:
    """Inputs by name: those that were given, and tokens where none were."""
    names = inspect.signature(model.forward).parameters
    if isinstance(example, Mapping):
        given: dict[str, object] = dict(example)
    elif example is not None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise CaptureError(
            f"the model reads one thing and writes another ({DECODER_TOKENS})",
            type(model).__name__,
            "an example of all its inputs by name",
            f"pass example={{'{getattr(model, 'main_input_name', 'input_ids')}': ..., '{DECODER_TOKENS}': ...}}",
        )
    else:
        given = {"input_ids": _made_up(9)}
    if DECODER_TOKENS in names and DECODER_TOKENS not in given:
        lengths = {
            value.shape[1] for value in given.values() if isinstance(value, Tensor) and value.dim() > 1
        }
        batch = next((value.shape[0] for value in given.values() if isinstance(value, Tensor)), 2)
        given[DECODER_TOKENS] = _made_up(next(size for size in (7, 6, 5, 4) if size not in lengths), batch)
    return given


def _made_up(length: int, batch: int = 2) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 5
