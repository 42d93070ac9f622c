"""Twenty-four small Hugging Face architectures with random weights, made offline.

    entry = ZOO["llama"]
    model = entry.make()
    inputs = entry.inputs(batch=2, length=7, seed=0)
    model(**inputs)

Weights are drawn again with a spread that keeps activations of order one, so that a wrong op shows in the
output (transformers starts at std 0.02, where every output is nearly the same).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import transformers as hf
from torch import nn

Kind = Literal["causal", "encoder", "image", "audio"]

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS = 64, 96, 2, 4, 2, 128, 128
WINDOW = 8  # short enough that the tests' sequences are longer
IMAGE, PATCH, MELS, FRAMES = 16, 8, 16, 32

EAGER_ONLY = ("gemma2", "bloom", "deberta_v2")

COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {
    **COMMON,
    "intermediate_size": INNER,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
}
ENCODER = {**COMMON, "intermediate_size": INNER, "max_position_embeddings": POSITIONS}


@dataclass(frozen=True)
class ZooEntry:
    """One architecture: `make(attention)` gives the model, `inputs(batch, length, seed)` its keyword
    arguments."""

    name: str
    kind: Kind
    factory: Callable[[str], nn.Module]

    @property
    def attentions(self) -> tuple[str, ...]:
        """Implementations of attention that transformers offers for this architecture, the default first."""
        return ("eager",) if self.name in EAGER_ONLY else ("sdpa", "eager")

    def make(self, attention: str | None = None, seed: int = 0) -> nn.Module:
        """The model in evaluation mode with redrawn weights; `attention` is one of `attentions`."""
        torch.manual_seed(seed)
        model = self.factory(attention or self.attentions[0]).eval()
        redraw(model, seed)
        return model.requires_grad_(False)

    def inputs(self, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs. Images and sounds have a fixed size: `length` does not matter there."""
        draw = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=draw)}
        if self.kind == "audio":
            return {"input_features": torch.randn(batch, MELS, FRAMES, generator=draw)}
        ids = torch.randint(3, VOCAB, (batch, length), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @property
    def varying(self) -> tuple[str, ...]:
        """Which of batch and length may vary."""
        return ("batch",) if self.kind in ("image", "audio") else ("batch", "length")


def redraw(model: nn.Module, seed: int) -> None:
    """Matrices with std 1/sqrt(fan in) (embeddings: 1), norms around 1, biases of 0.1: outputs vary and stay
    finite."""
    draw = torch.Generator().manual_seed(seed + 1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        with torch.no_grad():
            if id(parameter) in embeddings:
                parameter.copy_(noise * 0.5)
            elif parameter.dim() >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif "norm" in name.lower() or "ln" in name.lower():
                base = 0.0 if name.endswith("bias") else float(parameter.mean().round())
                parameter.copy_(base + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def _causal(config: Callable[..., hf.PretrainedConfig], **settings: object) -> Callable[[str], nn.Module]:
    return lambda attention: hf.AutoModelForCausalLM.from_config(
        config(**settings), attn_implementation=attention, dtype=torch.float32
    )


def _plain(config: Callable[..., hf.PretrainedConfig], **settings: object) -> Callable[[str], nn.Module]:
    return lambda attention: hf.AutoModel.from_config(
        config(**settings), attn_implementation=attention, dtype=torch.float32
    )


def _t5_encoder(attention: str) -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
    )
    config._attn_implementation = attention
    model: nn.Module = hf.T5EncoderModel(config)
    return model


def _whisper_encoder(attention: str) -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=MELS,
        d_model=HIDDEN,
        encoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=FRAMES // 2,
        max_target_positions=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    config._attn_implementation = attention
    model: nn.Module = hf.WhisperModel(config).get_encoder()
    return model


_GPT2 = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "vocab_size": VOCAB,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_VIT = {key: value for key, value in ENCODER.items() if key not in ("vocab_size", "max_position_embeddings")}

_CAUSAL: dict[str, Callable[[str], nn.Module]] = {
    "llama": _causal(hf.LlamaConfig, **DECODER),
    "mistral": _causal(hf.MistralConfig, **DECODER, sliding_window=WINDOW),
    "qwen2": _causal(hf.Qwen2Config, **DECODER),
    "qwen3": _causal(hf.Qwen3Config, **DECODER, head_dim=16),
    "gemma2": _causal(hf.Gemma2Config, **_GEMMA, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": _causal(
        hf.Gemma3TextConfig, **_GEMMA, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": _causal(hf.Phi3Config, **DECODER, original_max_position_embeddings=POSITIONS),
    "gpt2": _causal(hf.GPT2Config, **_GPT2),
    "gpt_neox": _causal(hf.GPTNeoXConfig, **ENCODER, rotary_pct=0.5),
    "opt": _causal(
        hf.OPTConfig, **COMMON, ffn_dim=INNER, max_position_embeddings=POSITIONS, word_embed_proj_dim=HIDDEN
    ),
    "bloom": _causal(
        hf.BloomConfig,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon": _causal(hf.FalconConfig, **COMMON, max_position_embeddings=POSITIONS),
    "olmo2": _causal(hf.Olmo2Config, **DECODER),
    "granite": _causal(
        hf.GraniteConfig,
        **DECODER,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "stablelm": _causal(hf.StableLmConfig, **DECODER, partial_rotary_factor=0.5),
    "starcoder2": _causal(hf.Starcoder2Config, **DECODER, sliding_window=WINDOW),
}
_ENCODERS: dict[str, Callable[[str], nn.Module]] = {
    "bert": _plain(hf.BertConfig, **ENCODER),
    "roberta": _plain(hf.RobertaConfig, **ENCODER),
    "distilbert": _plain(
        hf.DistilBertConfig,
        vocab_size=VOCAB,
        dim=HIDDEN,
        hidden_dim=INNER,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    ),
    "electra": _plain(hf.ElectraConfig, **ENCODER, embedding_size=32),
    "deberta_v2": _plain(
        hf.DebertaV2Config,
        **ENCODER,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "t5": _t5_encoder,
}

ZOO: dict[str, ZooEntry] = {
    **{name: ZooEntry(name, "causal", factory) for name, factory in _CAUSAL.items()},
    **{name: ZooEntry(name, "encoder", factory) for name, factory in _ENCODERS.items()},
    "vit": ZooEntry("vit", "image", _plain(hf.ViTConfig, **_VIT, image_size=IMAGE, patch_size=PATCH)),
    "whisper": ZooEntry("whisper", "audio", _whisper_encoder),
}
