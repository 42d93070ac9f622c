"""From a parsed GGUF file to a model: metadata, tensors by name, one builder per architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from torchweld.models.errors import ModelFileError
from torchweld.models.fields import Fields, check_heads
from torchweld.models.gemma3 import Gemma3, Gemma3Config
from torchweld.models.gguf import GgufFile
from torchweld.models.llama import Llama, LlamaConfig
from torchweld.models.weights import Weights

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA3_PARTS = _LLAMA_PARTS | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GLOBAL_EVERY = 6  # the file does not say: five local layers, then a global one
_LOCAL_BASE = 10_000.0  # nor this: the rotary base of the local layers


def model_from_gguf(file: GgufFile) -> nn.Module:
    """The model of a GGUF file, its weights as views of the file. ModelFileError names what does not fit."""
    return GGUF_BUILDERS[architecture_of(file)](file)


def architecture_of(file: GgufFile) -> str:
    """The file's general.architecture, once it is known to be one of GGUF_BUILDERS."""
    name = Fields(file.path, file.metadata).text("general.architecture")
    if name not in GGUF_BUILDERS:
        raise ModelFileError(
            file.path, f"unknown architecture {name!r:.60}", f"one of {', '.join(GGUF_BUILDERS)} (as GGUF)"
        )
    return name


class GgufSource:
    """A GGUF file as a Source; rows of tensors in `permuted` are put back in Hugging Face's order."""

    def __init__(self, file: GgufFile, permuted: Mapping[str, int] = MappingProxyType({})) -> None:
        self._file, self._permuted = file, permuted
        self.path: Path = file.path
        self.names: tuple[str, ...] = tuple(file.tensors)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Stored format and shape."""
        tensor = self._file.tensors[name]
        return tensor.format, tensor.shape

    def read(self, name: str) -> Tensor:
        """The stored data; a view of the file unless its rows are permuted."""
        data = self._file.read(name)
        return unpermute_rows(data, self._permuted[name]) if name in self._permuted else data


def unpermute_rows(data: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's reordering of query and key rows, head by head: [heads * D, bytes] -> the same shape.

    llama.cpp rotates neighbours (2i, 2i+1) and stores rows so; these models rotate (i, i + D/2).
    Whole rows move, so a stored format needs no decoding.
    """
    order = np.arange(data.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
    # numpy: 60 small copies, for which starting torch's threads costs more than the copying
    moved = data.detach()  # it counts its changes with the file's other tensors
    moved.data = torch.from_numpy(data.numpy()[order])
    return moved


def _names(parts: Mapping[str, str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        layer = _LAYER.fullmatch(name)
        return f"blk.{layer[1]}.{parts[layer[2]]}.weight" if layer else _TOP[name]

    return rename


def _llama(file: GgufFile) -> Llama:
    fields = Fields(file.path, file.metadata)
    fields.require("llama.rope.scaling.type", ("none",))
    fields.require("llama.expert_count", (0,))
    hidden, heads = fields.integer("llama.embedding_length"), fields.integer("llama.attention.head_count")
    head_size = fields.integer("llama.attention.key_length", hidden // heads)
    fields.require("llama.rope.dimension_count", (head_size,))
    config = LlamaConfig(
        vocabulary=_vocabulary(file),
        hidden=hidden,
        layers=fields.integer("llama.block_count"),
        heads=heads,
        kv_heads=fields.integer("llama.attention.head_count_kv", heads),
        head_size=head_size,
        intermediate=fields.integer("llama.feed_forward_length"),
        rope_base=fields.real("llama.rope.freq_base", 10_000.0),
        norm_eps=fields.real("llama.attention.layer_norm_rms_epsilon"),
        context=fields.integer("llama.context_length"),
    )
    check_heads(file.path, config.heads, config.kv_heads, config.head_size)
    layers = range(min(config.layers, len(file.tensors)))
    permuted = {f"blk.{i}.attn_q.weight": config.heads for i in layers}
    permuted |= {f"blk.{i}.attn_k.weight": config.kv_heads for i in layers}
    weights = Weights(GgufSource(file, permuted), _names(_LLAMA_PARTS))
    model = Llama(config, weights)
    weights.check_all_taken()
    return model


def _gemma3(file: GgufFile) -> Gemma3:
    fields = Fields(file.path, file.metadata)
    fields.require("gemma3.rope.scaling.type", ("none",))
    fields.require("gemma3.final_logit_softcapping", (0.0,))
    heads = fields.integer("gemma3.attention.head_count")
    head_size = fields.integer("gemma3.attention.key_length", 256)
    fields.require("gemma3.attention.value_length", (head_size,))
    layers = fields.integer("gemma3.block_count", high=4096)
    config = Gemma3Config(
        vocabulary=_vocabulary(file),
        hidden=fields.integer("gemma3.embedding_length"),
        heads=heads,
        kv_heads=fields.integer("gemma3.attention.head_count_kv"),
        head_size=head_size,
        intermediate=fields.integer("gemma3.feed_forward_length"),
        window=fields.integer("gemma3.attention.sliding_window"),
        query_scale=head_size**-0.5,
        rope_base=fields.real("gemma3.rope.freq_base", 1_000_000.0),
        rope_local_base=fields.real("gemma3.rope.local.freq_base", _LOCAL_BASE),
        norm_eps=fields.real("gemma3.attention.layer_norm_rms_epsilon"),
        context=fields.integer("gemma3.context_length"),
        is_global=tuple((i + 1) % _GLOBAL_EVERY == 0 for i in range(layers)),
    )
    check_heads(file.path, config.heads, config.kv_heads, config.head_size)
    weights = Weights(GgufSource(file), _names(_GEMMA3_PARTS))
    model = Gemma3(config, weights)
    weights.check_all_taken()
    return model


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embedding table, which must have a text for each where the file holds a vocabulary."""
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelFileError(file.path, "tensor 'token_embd.weight' is missing or not a matrix", "[V, d]")
    return table.shape[0]


GGUF_BUILDERS: Mapping[str, Callable[[GgufFile], nn.Module]] = MappingProxyType(
    {"llama": _llama, "gemma3": _gemma3}
)
