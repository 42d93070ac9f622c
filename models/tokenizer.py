"""Text to token ids and back, with the `tokenizers` library and the model's own files.

A vocabulary takes up to seconds to build, so it is built on first use; loading a model does not wait for it.
`tokenizer_gguf.py` builds from a GGUF vocabulary; here are the common face and Hugging Face's tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Core

from torchweld.models.errors import ModelFileError
from torchweld.models.fields import Fields
from torchweld.models.safetensors import read_config

_MOST_TEMPLATE_BYTES = 1 << 20  # the longest templates of public models are 30 KB


class TextError(ValueError):
    """A text that is no Unicode: names the place and what is there."""


@dataclass(frozen=True)
class ChatTemplate:
    """The Jinja source that makes one text of a conversation, and the special texts that it may write."""

    source: str
    bos_token: str = ""
    eos_token: str = ""


class Tokenizer:
    """Token ids of a text, text of token ids.

    bos: put before every text. eos: ids that end a text. chat: how the model wants a conversation written, if its
    files say so.
    """

    def __init__(
        self,
        path: Path,
        build: Callable[[], Core],
        bos: int | None,
        eos: tuple[int, ...],
        chat: ChatTemplate | None = None,
    ) -> None:
        self.path, self._build, self.bos, self.eos, self.chat = path, build, bos, eos, chat

    @cached_property
    def core(self) -> Core:
        """The `tokenizers` object. Raises ModelFileError where the vocabulary makes no tokenizer."""
        try:
            return self._build()
        except ModelFileError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ModelFileError(self.path, f"the vocabulary makes no tokenizer ({error})") from None

    def get_vocab(self) -> dict[str, int]:
        """Token text -> id as the file spells it, special tokens included."""
        return dict(self.core.get_vocab(with_added_tokens=True))

    def encode(self, text: str, *, rendered: bool = False) -> list[int]:
        """Ids of a text, special tokens in it recognized, with the start token (never twice) where the model wants one.

        rendered: the text comes from a chat template, which has written the special tokens itself.
        Raises TextError for half a surrogate pair (what Python makes of bytes that are not UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"{text[error.start]!r} at character {error.start} is half a surrogate pair"
            raise TextError(f"{what}; expected Unicode text, such as UTF-8 input gives") from None
        ids: list[int] = self.core.encode(text, add_special_tokens=not rendered).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.core.decode(list(ids), skip_special_tokens=True))


def tokenizer_from_folder(folder: Path, config: Fields) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder (tokenizer.json); None where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    eos = _eos_ids(_optional(folder, "generation_config.json")) or _eos_ids(config)
    return Tokenizer(path, lambda: _from_json(path), None, eos, _template_of(folder))


def check_template(path: Path, source: str) -> str:
    """The source of a chat template, unless it is far longer than any of them (ModelFileError)."""
    if len(source.encode("utf-8", errors="surrogatepass")) > _MOST_TEMPLATE_BYTES:
        raise ModelFileError(
            path, f"a chat template of {len(source)} characters", f"{_MOST_TEMPLATE_BYTES} bytes at most"
        )
    return source


def _from_json(path: Path) -> Core:
    core = Core.from_file(str(path))
    core.no_padding()  # files saved by sentence-transformers pad every text to one length
    core.no_truncation()
    return core


def _optional(folder: Path, name: str) -> Fields:
    """A JSON file of the folder; no fields where it is missing."""
    return read_config(folder, name) if (folder / name).is_file() else Fields(folder / name, {})


def _eos_ids(config: Fields) -> tuple[int, ...]:
    """eos_token_id of a config: one id, an array of ids, or none."""
    if not config.has("eos_token_id"):
        return ()
    try:
        return (config.integer("eos_token_id", low=0),)
    except ModelFileError:
        return tuple(sorted(config.integers("eos_token_id")))


def _template_of(folder: Path) -> ChatTemplate | None:
    """chat_template.jinja, or the template in tokenizer_config.json; None where there is neither."""
    config = _optional(folder, "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            source = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(file, f"cannot be read ({error})", "a text file") from None
    elif config.has("chat_template"):
        source = _default_template(config)
    else:
        return None
    return ChatTemplate(
        check_template(file, source), _token(config, "bos_token"), _token(config, "eos_token")
    )


def _default_template(config: Fields) -> str:
    """A template alone, or the one called "default" of several."""
    try:
        return config.text("chat_template")
    except ModelFileError:
        for named in config.tables("chat_template"):
            if named.text("name") == "default":
                return named.text("template")
        raise


def _token(config: Fields, key: str) -> str:
    """The text of a special token: alone, or in a table of its properties; "" where there is none."""
    if not config.has(key):
        return ""
    try:
        return config.text(key)
    except ModelFileError:
        return config.sub(key).text("content")
