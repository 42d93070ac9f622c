"""Capture a causal language model as ids [B, S] -> logits, whatever else its forward takes and gives.

    program = capture_causal(hugging_face_model)
    program = capture_causal(my_module, torch.tensor([[3, 1, 4], [1, 5, 9]]))

A Hugging Face model runs without its own cache and without an attention mask, which means that every token counts.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from torchweld.graph.capture import capture
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.program import Program


def capture_causal(model: nn.Module, example: Tensor | None = None, *, verify: bool = True) -> Program:
    """The program of `model` over tokens alone; example: int64 [B, S] ids that it accepts (made up without it).

    verify: as for `capture`.  Raises CaptureError, also for an encoder-decoder.
    """
    ids = torch.arange(2 * 7).reshape(2, 7) % 5 if example is None else example
    names = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in names:
        raise CaptureError(
            "the model reads one text and writes another (decoder_input_ids): cross attention has no state rule",
            type(model).__name__,
            "a causal language model of one text",
            "decode it with its own cache",
        )
    if "input_ids" not in names:
        return capture(model, (ids,), verify=verify)
    keywords: dict[str, object] = {"input_ids": ids}
    if "use_cache" in names:
        keywords["use_cache"] = False
    return capture(model, (), keywords, verify=verify)
