"""Our own model definitions with tiny random weights, made by way of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from torchweld.models.from_folder import model_from_folder

VOCABULARY = 97


def tiny_model(
    kind: str, folder: Path, seed: int = 7, dtype: torch.dtype = torch.float32, **changes: object
) -> nn.Module:
    """A `kind` of 2 layers with random weights; `changes` go into the Hugging Face configuration."""
    torch.manual_seed(seed)
    model = _CLASSES[kind](_config(kind, changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.dim() > 1 else 0.5))
    place = folder / f"{kind}-{seed}-{dtype}-{len(list(folder.iterdir()))}"
    model.to(dtype).save_pretrained(place)
    return model_from_folder(place).eval()


def tiny_inputs(kind: str, batch: int = 2, length: int = 8) -> tuple[Tensor, ...]:
    """Arguments for a tiny model: ids, and the attention mask of an encoder."""
    ids = torch.arange(batch * length).reshape(batch, length) % VOCABULARY
    return (ids, torch.ones_like(ids)) if kind == "bert" else (ids,)


def _config(kind: str, changes: dict[str, object]) -> transformers.PretrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    grouped = sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    if kind == "llama":
        return transformers.LlamaConfig(**(grouped | {"tie_word_embeddings": False} | changes))
    if kind == "gemma3_text":
        windows = {"sliding_window": 5, "sliding_window_pattern": 2}
        return transformers.Gemma3TextConfig(**(grouped | windows | changes))
    if kind == "gpt2":
        plain = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return transformers.GPT2Config(**(plain | changes))
    places = {"num_attention_heads": 4, "max_position_embeddings": 32}
    return transformers.BertConfig(**(sizes | places | changes))


_CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gemma3_text": transformers.Gemma3ForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertModel,
}
