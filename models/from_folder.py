"""From a Hugging Face folder to a model: config.json, safetensors, one builder per model_type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from torchweld.models.bert import Bert, BertConfig, SentenceEncoder
from torchweld.models.errors import ModelFileError
from torchweld.models.fields import Fields, check_heads
from torchweld.models.gemma3 import Gemma3, Gemma3Config
from torchweld.models.gpt2 import Gpt2, Gpt2Config
from torchweld.models.llama import Llama, LlamaConfig
from torchweld.models.safetensors import open_folder, read_config
from torchweld.models.weights import Source, Weights


def model_from_folder(folder: Path) -> nn.Module:
    """The model of a Hugging Face folder. ModelFileError names what does not fit."""
    fields = read_config(folder)
    build = FOLDER_BUILDERS[folder_architecture(fields)]
    model = build(fields, open_folder(folder))
    if isinstance(model, Bert) and is_sentence_encoder(folder):
        return SentenceEncoder(model)
    return model


def folder_architecture(fields: Fields) -> str:
    """The model_type of config.json, once it is known to be one of FOLDER_BUILDERS."""
    name = fields.text("model_type")
    if name not in FOLDER_BUILDERS:
        raise ModelFileError(
            fields.path,
            f"unknown architecture {name!r:.60}",
            f"one of {', '.join(FOLDER_BUILDERS)}",
            "give other models as an object, or as file.py:factory",
        )
    return name


def is_sentence_encoder(folder: Path) -> bool:
    """Whether sentence-transformers would average over the tokens here (1_Pooling/config.json says so)."""
    pooling = "1_Pooling/config.json"
    if not (folder / pooling).is_file():
        return False
    return read_config(folder, pooling).flag("pooling_mode_mean_tokens", False)


def llama_from(fields: Fields, source: Source) -> Llama:
    """A Llama from the settings of LlamaConfig (Hugging Face) and its checkpoint."""
    fields.require("hidden_act", ("silu",))
    fields.require("attention_bias", (False,))
    fields.require("mlp_bias", (False,))
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    config = LlamaConfig(
        vocabulary=fields.integer("vocab_size"),
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_size=fields.integer("head_dim", hidden // heads),
        intermediate=fields.integer("intermediate_size"),
        rope_base=_rope_base(fields),
        norm_eps=fields.real("rms_norm_eps", 1e-6),
        context=fields.integer("max_position_embeddings", 2048),
    )
    check_heads(fields.path, config.heads, config.kv_heads, config.head_size)
    weights = Weights(source)
    model = Llama(config, weights)
    weights.check_all_taken(lambda name: name.endswith("rotary_emb.inv_freq"))
    return model


def gemma3_from(fields: Fields, source: Source) -> Gemma3:
    """A Gemma 3 text model from the settings of Gemma3TextConfig (Hugging Face) and its checkpoint."""
    fields.require("hidden_activation", ("gelu_pytorch_tanh",))
    fields.require("attention_bias", (False,))
    fields.require("use_bidirectional_attention", (False,))
    fields.require("attn_logit_softcapping", ())
    fields.require("final_logit_softcapping", ())
    local = fields.sub("rope_parameters").sub("sliding_attention")
    config = Gemma3Config(
        vocabulary=fields.integer("vocab_size"),
        hidden=fields.integer("hidden_size"),
        heads=fields.integer("num_attention_heads"),
        kv_heads=fields.integer("num_key_value_heads"),
        head_size=fields.integer("head_dim", 256),
        intermediate=fields.integer("intermediate_size"),
        window=fields.integer("sliding_window"),
        query_scale=fields.real("query_pre_attn_scalar", 256.0) ** -0.5,
        rope_base=_rope_base(fields, "full_attention", 1_000_000.0),
        rope_local_base=local.real("rope_theta", fields.real("rope_local_base_freq", 10_000.0)),
        norm_eps=fields.real("rms_norm_eps", 1e-6),
        context=fields.integer("max_position_embeddings", 131_072),
        is_global=_global_layers(fields),
    )
    check_heads(fields.path, config.heads, config.kv_heads, config.head_size)
    weights = Weights(_NormPlusOne(source))
    model = Gemma3(config, weights)
    weights.check_all_taken(lambda name: name == "lm_head.weight")  # the same table, saved twice
    return model


def gpt2_from(fields: Fields, source: Source) -> Gpt2:
    """A GPT-2 from the settings of GPT2Config (Hugging Face) and its checkpoint."""
    fields.require("activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    fields.require("scale_attn_weights", (True,))
    fields.require("scale_attn_by_inverse_layer_idx", (False,))
    fields.require("add_cross_attention", (False,))
    hidden = fields.integer("n_embd")
    config = Gpt2Config(
        vocabulary=fields.integer("vocab_size"),
        hidden=hidden,
        layers=fields.integer("n_layer"),
        heads=fields.integer("n_head"),
        intermediate=fields.integer("n_inner", 4 * hidden),
        context=fields.integer("n_positions"),
        norm_eps=fields.real("layer_norm_epsilon", 1e-5),
    )
    _check_divides(fields, "n_head", config.heads, hidden)
    prefixed = "transformer.wte.weight" in set(source.names)
    prefix = "transformer." if prefixed else ""
    weights = Weights(source, lambda name: name if name == "lm_head.weight" else prefix + name)
    model = Gpt2(config, weights)
    weights.check_all_taken(lambda name: name.endswith((".attn.bias", ".attn.masked_bias")))  # causal masks
    return model


def bert_from(fields: Fields, source: Source) -> Bert:
    """A BERT encoder from the settings of BertConfig (Hugging Face) and its checkpoint, without its heads."""
    fields.require("hidden_act", ("gelu",))
    fields.require("position_embedding_type", ("absolute",))
    fields.require("is_decoder", (False,))
    hidden = fields.integer("hidden_size")
    config = BertConfig(
        vocabulary=fields.integer("vocab_size"),
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        heads=fields.integer("num_attention_heads"),
        intermediate=fields.integer("intermediate_size"),
        context=fields.integer("max_position_embeddings"),
        segments=fields.integer("type_vocab_size", 2),
        norm_eps=fields.real("layer_norm_eps", 1e-12),
    )
    _check_divides(fields, "num_attention_heads", config.heads, hidden)
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in set(source.names) else ""
    weights = Weights(source, lambda name: prefix + name)
    model = Bert(config, weights)
    extras = (f"{prefix}pooler.", f"{prefix}embeddings.position_ids", "cls.")
    weights.check_all_taken(lambda name: name.startswith(extras))
    return model


class _NormPlusOne:
    """A Source of Hugging Face's Gemma, whose norm weights are held as w: read as float32 w + 1."""

    def __init__(self, source: Source) -> None:
        self._source, self.path, self.names = source, source.path, source.names

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        format, shape = self._source.describe(name)
        return ("F32", shape) if name.endswith("norm.weight") else (format, shape)

    def read(self, name: str) -> Tensor:
        if not name.endswith("norm.weight"):
            return self._source.read(name)
        _, shape = self._source.describe(name)
        return 1.0 + Weights(self._source).vector(name, shape[-1])


def _rope_base(fields: Fields, kind: str = "", default: float = 10_000.0) -> float:
    """The rotary base, from the old spelling (rope_theta) or the new (rope_parameters); no scaling."""
    parameters = fields.sub("rope_parameters")
    parameters = parameters.sub(kind) if kind else parameters
    for table in (parameters, fields.sub("rope_scaling")):
        table.require("rope_type", ("default",))
        table.require("type", ("default",))
    return parameters.real("rope_theta", fields.real("rope_theta", default))


def _global_layers(fields: Fields) -> tuple[bool, ...]:
    layers = fields.integer("num_hidden_layers", high=4096)
    if not fields.has("layer_types"):
        every = fields.integer("sliding_window_pattern", 6)
        return tuple((i + 1) % every == 0 for i in range(layers))
    kinds = fields.strings("layer_types")
    known = {"full_attention", "sliding_attention"}
    if len(kinds) != layers or not set(kinds) <= known:
        raise ModelFileError(fields.path, "setting 'layer_types'", f"{layers} of {', '.join(sorted(known))}")
    return tuple(kind == "full_attention" for kind in kinds)


def _check_divides(fields: Fields, key: str, heads: int, hidden: int) -> None:
    if hidden % heads:
        expected = f"a divisor of {hidden}, the hidden size"
        raise ModelFileError(fields.path, f"setting {key!r} is {heads}", expected)


FOLDER_BUILDERS: Mapping[str, Callable[[Fields, Source], nn.Module]] = MappingProxyType(
    {"llama": llama_from, "gemma3_text": gemma3_from, "gpt2": gpt2_from, "bert": bert_from}
)
