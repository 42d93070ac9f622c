"""Tokenizers from the vocabulary of a GGUF file, as llama.cpp reads it: byte-level BPE and SentencePiece BPE.

Both are held to Hugging Face's own converter on awkward texts, and where that one is wrong to the definitions: it
ignores the pre-tokenizer named "smollm", and cuts runs of spaces longer than the longest token otherwise than
SentencePiece does (tests/models/test_tokenizer_equal.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE

from torchweld.models.errors import ModelFileError
from torchweld.models.fields import Fields
from torchweld.models.gguf import GgufFile
from torchweld.models.tokenizer import ChatTemplate, Tokenizer, check_template
from torchweld.models.tokenizer_splits import SPLITS

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
# control tokens that end a turn or a text, whatever eos_token_id says (the list of llama.cpp, for our models)
_END_TEXTS = frozenset({"<|endoftext|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>"})
_SPACE = "▁"


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
    bos = _bos(fields, kind, len(tokens))
    chat = _template(fields, tokens, eos)
    return Tokenizer(file.path, lambda: build(fields), bos, tuple(sorted({eos, *named})), chat)


def _bos(fields: Fields, kind: str, tokens: int) -> int | None:
    """The token before every text. Files without the flag: SentencePiece and Llama 3 have one (llama.cpp)."""
    split = SPLITS.get(fields.text("tokenizer.ggml.pre", "gpt-2"))
    usual = kind == "llama" or (kind == "gpt2" and split is not None and split.starts_with_bos)
    if not fields.flag("tokenizer.ggml.add_bos_token", usual):
        return None
    return fields.integer("tokenizer.ggml.bos_token_id", low=0, high=tokens - 1)


def _template(fields: Fields, tokens: Sequence[str], eos: int) -> ChatTemplate | None:
    if not fields.has("tokenizer.chat_template"):
        return None
    source = check_template(fields.path, fields.text("tokenizer.chat_template"))
    bos = ""
    if fields.has("tokenizer.ggml.bos_token_id"):
        bos = tokens[fields.integer("tokenizer.ggml.bos_token_id", low=0, high=len(tokens) - 1)]
    return ChatTemplate(source, bos, tokens[eos])


def _byte_level(fields: Fields) -> Core:
    """GPT-2's byte-level BPE: merges are listed, the pre-tokenizer is named by tokenizer.ggml.pre."""
    name = fields.text("tokenizer.ggml.pre", "gpt-2")
    if name not in SPLITS:
        raise ModelFileError(
            fields.path, f"unknown tokenizer.ggml.pre {name!r:.60}", f"one of {', '.join(SPLITS)}"
        )
    tokens = fields.strings("tokenizer.ggml.tokens")
    merges = [_pair(fields.path, merge) for merge in fields.strings("tokenizer.ggml.merges")]
    vocabulary = {text: i for i, text in enumerate(tokens)}
    core = Core(BPE(vocab=vocabulary, merges=merges, ignore_merges=SPLITS[name].whole_words_first))
    core.pre_tokenizer = SPLITS[name].pre_tokenizer()
    core.decoder = decoders.ByteLevel()
    _add_special(core, fields, tokens)
    return core


def _pair(path: Path, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelFileError(path, f"merge {merge!r:.60} in tokenizer.ggml.merges", "two texts with a space")
    return left, right


def _sentence_piece(fields: Fields) -> Core:
    """SentencePiece BPE: defined symbols are kept whole, then pairs merge in order of the score of what they make."""
    tokens = fields.strings("tokenizer.ggml.tokens")
    kinds, scores = (fields.numbers(f"tokenizer.ggml.{key}", len(tokens)) for key in ("token_type", "scores"))
    vocabulary = {text: i for i, text in enumerate(tokens)}
    pairs = [
        (-score, _splits(text, vocabulary))
        for text, kind, score in zip(tokens, kinds, scores, strict=True)
        if kind == _NORMAL and len(text) > 1
    ]
    pairs.sort(key=lambda pair: pair[0])
    merges = [split for _, splits in pairs for split in splits]
    unknown = tokens[fields.integer("tokenizer.ggml.unknown_token_id", 0, low=0, high=len(tokens) - 1)]
    core = Core(BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    # GGUF spells runs of spaces as spaces; SentencePiece looks for them where spaces have become its own sign
    _add_special(core, fields, tokens, respelled=not prefix)
    return core


def _splits(text: str, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to make a token from two tokens, in order of their ids (as Hugging Face converts them)."""
    cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
    found = [(a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
    return sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _add_special(core: Core, fields: Fields, tokens: tuple[str, ...], respelled: bool = False) -> None:
    """Tokens that are found in a text whole. respelled: those with a space are looked for in the normalized text."""
    kinds = fields.numbers("tokenizer.ggml.token_type", len(tokens))
    control = (text for text, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL)
    defined = (text for text, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED)
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    core.add_tokens([AddedToken(text, normalized=respelled and " " in text) for text in defined])


_BUILDERS: Mapping[str, Callable[[Fields], Core]] = MappingProxyType(
    {"gpt2": _byte_level, "llama": _sentence_piece}
)
