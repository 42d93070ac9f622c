"""Torch eager as a fair opponent: weights decoded once to float32, not at every call.

A model read from GGUF keeps its stored bytes, and run eagerly it decodes all of them in every call. Nobody would
run it so in torch; what they would do is load it as float32.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from torchweld.models.layers import StoredEmbedding, StoredLinear, decoded


def decoded_model(module: nn.Module) -> nn.Module:
    """A copy of `module` whose stored weights are float32; other tensors, and tied weights, stay shared.

    Costs 4 bytes per stored weight. A module without stored weights is returned as it is.
    """
    stored = [part for part in module.modules() if isinstance(part, StoredLinear | StoredEmbedding)]
    if all(part.format == "F32" for part in stored):
        return module
    # Every tensor stands for itself in the copy, so that only the modules are copied.
    tensors = (*module.parameters(), *module.buffers())
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    dense: dict[int, Tensor] = {}
    with torch.no_grad():
        for part in twin.modules():
            if isinstance(part, StoredLinear | StoredEmbedding) and part.format != "F32":
                key = id(part.weight)
                if key not in dense:
                    dense[key] = decoded(part.weight, part.format, part.columns)
                part.weight, part.format = dense[key], "F32"
    return twin
