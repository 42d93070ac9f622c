"""Further Hugging Face decoders, small and with random weights: no rule was written for one of them.

    model = make_decoder("phi")

tests/zoo.py has the architectures that everything is tested on. These show whether the mechanism is general; some of
them (mixtures of experts, recurrences) do not decode, and the refusal must name why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers as hf
from torch import nn

from tests.zoo import COMMON, DECODER, HEADS, HIDDEN, INNER, LAYERS, POSITIONS, VOCAB, WINDOW, redraw

_HEAD = HIDDEN // HEADS
_GPT: Final = {
    "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB, "n_positions": POSITIONS,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MIXED: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: Final[dict[str, Callable[[], Any]]] = {
    "codegen": lambda: hf.CodeGenConfig(**_GPT, rotary_dim=8, n_inner=INNER),
    "gptj": lambda: hf.GPTJConfig(**_GPT, rotary_dim=8, n_inner=INNER),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**_GPT, multi_query=True),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=HIDDEN, num_layers=2, num_heads=HEADS, attention_types=[[["global", "local"], 1]],
        window_size=WINDOW, vocab_size=VOCAB, max_position_embeddings=POSITIONS, bos_token_id=1, eos_token_id=2,
    ),
    "openai-gpt": lambda: hf.OpenAIGPTConfig(**_GPT),
    "ctrl": lambda: hf.CTRLConfig(**_GPT, dff=INNER),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=VOCAB, d_model=HIDDEN, ffn_dim=INNER, num_layers=LAYERS, attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    ),
    "biogpt": lambda: hf.BioGptConfig(**COMMON, intermediate_size=INNER, max_position_embeddings=POSITIONS),
    "mpt": lambda: hf.MptConfig(
        d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, vocab_size=VOCAB, max_seq_len=POSITIONS, expansion_ratio=2
    ),
    "phi": lambda: hf.PhiConfig(**DECODER, partial_rotary_factor=0.5),
    "persimmon": lambda: hf.PersimmonConfig(**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"}),
    "gemma": lambda: hf.GemmaConfig(**DECODER, head_dim=_HEAD),
    "cohere": lambda: hf.CohereConfig(**DECODER, use_qk_norm=True),
    "cohere2": lambda: hf.Cohere2Config(**DECODER, **_MIXED),
    "olmo": lambda: hf.OlmoConfig(**DECODER, clip_qkv=4.0),
    "olmo3": lambda: hf.Olmo3Config(**DECODER, **_MIXED),
    "nemotron": lambda: hf.NemotronConfig(**DECODER),
    "glm": lambda: hf.GlmConfig(**DECODER, head_dim=_HEAD),
    "glm4": lambda: hf.Glm4Config(**DECODER, head_dim=_HEAD),
    "smollm3": lambda: hf.SmolLM3Config(**DECODER),
    "exaone4": lambda: hf.Exaone4Config(**DECODER, **_MIXED),
    "helium": lambda: hf.HeliumConfig(**DECODER, head_dim=_HEAD),
    "ernie4_5": lambda: hf.Ernie4_5Config(**DECODER, head_dim=_HEAD),
    "arcee": lambda: hf.ArceeConfig(**DECODER),
    "apertus": lambda: hf.ApertusConfig(**DECODER),
    "hunyuan_v1_dense": lambda: hf.HunYuanDenseV1Config(**DECODER, head_dim=_HEAD),
    "gpt_oss": lambda: hf.GptOssConfig(
        **DECODER, head_dim=_HEAD, num_local_experts=4, num_experts_per_tok=2, **_MIXED
    ),
    "mixtral": lambda: hf.MixtralConfig(**DECODER, num_local_experts=4),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **DECODER, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=32
    ),
    "olmoe": lambda: hf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2),
    "mamba": lambda: hf.MambaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=8, pad_token_id=0
    ),
    "lfm2": lambda: hf.Lfm2Config(**DECODER, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def make_decoder(name: str, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, on eager attention where transformers has no other, with redrawn weights."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    try:
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except ValueError:
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    redraw(model, seed)
    done: nn.Module = model.eval().requires_grad_(False)
    return done
