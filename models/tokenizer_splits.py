"""How byte-level vocabularies cut a text into words before they merge, by the name in tokenizer.ggml.pre.

Names, expressions and properties are those of llama.cpp (its `llama-vocab.cpp`), which gives a vocabulary the name of
the pre-tokenizer that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True)
class Split:
    """One way to cut. pattern: None for GPT-2's own; digits_first: every digit is a word of its own before that.

    whole_words_first: a word that is a token is taken whole, whatever the merges would make of it.
    starts_with_bos: texts begin with the start token unless the file says otherwise.
    """

    pattern: str | None = None
    digits_first: bool = False
    whole_words_first: bool = False
    starts_with_bos: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The `tokenizers` object."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits_first:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|"
    rf"\p{{N}}{{1,3}}|{_REST}"
)

SPLITS: Mapping[str, Split] = MappingProxyType(
    {
        "gpt-2": Split(),
        "smollm": Split(digits_first=True),
        "starcoder": Split(digits_first=True),
        "refact": Split(digits_first=True),
        "llama-bpe": Split(_LLAMA3, whole_words_first=True, starts_with_bos=True),
        "qwen2": Split(_QWEN2),
        "tekken": Split(_TEKKEN, whole_words_first=True, starts_with_bos=True),
        "gpt-4o": Split(_GPT4O),
    }
)
