"""Text to token ids and back: `tokenizers` objects built from a GGUF vocabulary or from tokenizer.json.

A vocabulary takes up to seconds to build, so it is built on first use; loading a model does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE

from torchweld.models.errors import ModelFileError
from torchweld.models.fields import Fields
from torchweld.models.gguf import GgufFile
from torchweld.models.safetensors import read_config

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
# control tokens that end a turn or a text, whatever eos_token_id says (the list of llama.cpp, for our models)
_END_TEXTS = frozenset({"<|endoftext|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>"})


class Tokenizer:
    """Token ids of a text, text of token ids. `bos`: put before every text; `eos`: ids that end a text."""

    def __init__(self, path: Path, build: Callable[[], Core], bos: int | None, eos: tuple[int, ...]) -> None:
        self.path, self._build, self.bos, self.eos = path, build, bos, eos

    @cached_property
    def core(self) -> Core:
        """The `tokenizers` object. Raises ModelFileError where the vocabulary makes no tokenizer."""
        try:
            return self._build()
        except ModelFileError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ModelFileError(self.path, f"the vocabulary makes no tokenizer ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it recognized, with the start token where the model wants one."""
        ids: list[int] = self.core.encode(text).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.core.decode(list(ids), skip_special_tokens=True))


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer | None:
    """The tokenizer of a GGUF file; None where the file holds no vocabulary."""
    fields = Fields(file.path, file.metadata)
    if not fields.has("tokenizer.ggml.tokens"):
        return None
    tokens = fields.strings("tokenizer.ggml.tokens")
    kind = fields.text("tokenizer.ggml.model")
    build = _BUILDERS.get(kind)
    if build is None:
        raise ModelFileError(
            file.path, f"unknown tokenizer.ggml.model {kind!r:.60}", f"one of {', '.join(_BUILDERS)}"
        )
    kinds = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    special = (i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED))
    named = {i for i in special if tokens[i] in _END_TEXTS}
    eos = fields.integer("tokenizer.ggml.eos_token_id", low=0, high=len(tokens) - 1)
    adds_bos = fields.flag("tokenizer.ggml.add_bos_token", kind == "llama")
    bos = fields.integer("tokenizer.ggml.bos_token_id", low=0, high=len(tokens) - 1) if adds_bos else None
    return Tokenizer(file.path, lambda: build(fields), bos, tuple(sorted({eos, *named})))


def tokenizer_from_folder(folder: Path, config: Fields) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder (tokenizer.json); None where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    name = "generation_config.json"
    eos = _eos_ids(read_config(folder, name)) if (folder / name).is_file() else ()
    return Tokenizer(path, lambda: _from_json(path), None, eos or _eos_ids(config))


def _from_json(path: Path) -> Core:
    core = Core.from_file(str(path))
    core.no_padding()  # files saved by sentence-transformers pad every text to one length
    core.no_truncation()
    return core


def _eos_ids(config: Fields) -> tuple[int, ...]:
    """eos_token_id of a config: one id, an array of ids, or none."""
    if not config.has("eos_token_id"):
        return ()
    try:
        return (config.integer("eos_token_id", low=0),)
    except ModelFileError:
        return tuple(sorted(config.integers("eos_token_id")))


def _byte_level(fields: Fields) -> Core:
    """GPT-2's byte-level BPE: merges are listed, the pre-tokenizer is named by tokenizer.ggml.pre."""
    name = fields.text("tokenizer.ggml.pre", "gpt-2")
    if name not in _PRE_TOKENIZERS:
        raise ModelFileError(
            fields.path, f"unknown tokenizer.ggml.pre {name!r:.60}", f"one of {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = fields.strings("tokenizer.ggml.tokens")
    merges = [_pair(fields.path, merge) for merge in fields.strings("tokenizer.ggml.merges")]
    core = Core(BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = _PRE_TOKENIZERS[name]()
    core.decoder = decoders.ByteLevel()
    _add_special(core, fields, tokens)
    return core


def _pair(path: Path, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelFileError(path, f"merge {merge!r:.60} in tokenizer.ggml.merges", "two texts with a space")
    return left, right


def _sentence_piece(fields: Fields) -> Core:
    """SentencePiece BPE: pairs merge in order of the score of the token that they make."""
    tokens = fields.strings("tokenizer.ggml.tokens")
    kinds, scores = (fields.numbers(f"tokenizer.ggml.{key}", len(tokens)) for key in ("token_type", "scores"))
    vocabulary = {text: i for i, text in enumerate(tokens)}
    pairs: list[tuple[float, list[tuple[str, str]]]] = []
    for text, kind, score in zip(tokens, kinds, scores, strict=True):
        if kind == _USER_DEFINED:
            pairs.append((float("-inf"), _splits(text, vocabulary)))  # always kept whole
        elif kind == _NORMAL and len(text) > 1:
            pairs.append((-score, _splits(text, vocabulary)))
    pairs.sort(key=lambda pair: pair[0])
    merges = [split for _, splits in pairs for split in splits]
    unknown = tokens[fields.integer("tokenizer.ggml.unknown_token_id", 0, low=0, high=len(tokens) - 1)]
    core = Core(BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    _add_special(core, fields, tokens)
    return core


def _splits(text: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to make a token from two tokens, in order of their ids (as Hugging Face converts them)."""
    cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
    found = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
    return sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _add_special(core: Core, fields: Fields, tokens: tuple[str, ...]) -> None:
    kinds = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    control = (text for text, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL)
    defined = (text for text, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED)
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    core.add_tokens([AddedToken(text, normalized=False) for text in defined])


def _gpt2_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_pre_tokenizer()])


def _llama3_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = MappingProxyType(
    {"gpt-2": _gpt2_pre_tokenizer, "smollm": _smollm_pre_tokenizer, "llama-bpe": _llama3_pre_tokenizer}
)
_BUILDERS: Mapping[str, Callable[[Fields], Core]] = MappingProxyType(
    {"gpt2": _byte_level, "llama": _sentence_piece}
)
