"""C++ names and types for the kernel IR: identifiers that clash with nothing, element types, literals."""

from __future__ import annotations

import math
import re
from typing import Final

import numpy as np
import torch

_KEYWORDS: Final = frozenset(
    """alignas alignof and asm auto bool break case catch char class const constexpr continue decltype default delete do
    double else enum explicit export extern false float for friend goto if inline int long mutable namespace new not
    operator or private protected public register return short signed sizeof static struct switch template this throw
    true try typedef typeid typename union unsigned using virtual void volatile while xor
    exp exp2 log log2 log1p expm1 sin cos tanh erf pow atan2 fmod logf log2f log1pf expm1f exp2f sinf cosf powf atan2f
    fmodf floor ceil round trunc rint nearbyint sqrt abs fabs fma fmin fmax sinh cosh floorf ceilf roundf truncf rintf
    sqrtf fabsf memcpy memset memmove memcmp index select clone signal read write main exit abort buffers
    sizes thread threads scratch error unix linux
    share point unit blocks rows row_blocks block_rows column_blocks first_row first_column columns ready batch r m j
    decoded query_blocks first_query first_key last_key begin_key end_key keys q_rows k_rows v_rows k_at v_at scores
    visible_from visible_to greatest total result from to
    block width block_end begin end score outputs features d_stride f_stride key last_visible
    block_columns narrow panel_row unpacked
    share_of_one units spread splits task first_head past slots past_slot visible first_split end_split filled
    split split_end state sums turned joined attend_rows begin_row end_row seen last keep number count group q slot
    new_row depth fits best found line searched
    tile_room tile view work show lanes end_key hidden mask_rows query_pairs weight_pairs""".split()
)

_STORAGE: Final = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "uint16_t",
    torch.float16: "uint16_t",
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.uint16: "uint16_t",
    torch.int32: "int32_t",
    torch.uint32: "uint32_t",
    torch.int64: "int64_t",
}
HALVES: Final = {torch.bfloat16: "bf16", torch.float16: "f16"}


class PrintError(ValueError):
    """A kernel that the C++ printer has no words for; names the kernel and the construct."""


class Namer:
    """Identifiers of one kernel: the wished name where it is free and legal, else with a number behind it."""

    def __init__(self) -> None:
        self._taken: set[str] = set(_KEYWORDS)

    def fresh(self, wish: str) -> str:
        """An identifier like `wish` that nothing else in the kernel has."""
        base = re.sub(r"\W+", "_", wish) or "v"
        if base[0].isdigit() or base.startswith(("tw_", "_")):
            base = "v" + base.lstrip("_")
        name, number = base, 1
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        return name

    @property
    def taken(self) -> frozenset[str]:
        """The identifiers given out so far, and the words that are none."""
        return frozenset(self._taken)


def storage_type(dtype: torch.dtype) -> str:
    """The C++ type of an element in memory; 16-bit floats are their bits."""
    if dtype not in _STORAGE:
        raise PrintError(f"no C++ type for {dtype}; the printer knows {', '.join(map(str, _STORAGE))}")
    return _STORAGE[dtype]


def value_type(dtype: torch.dtype) -> str:
    """The C++ type of a value while it is computed with; 16-bit floats are floats."""
    return "float" if dtype in HALVES else storage_type(dtype)


def loaded(text: str, dtype: torch.dtype) -> str:
    """An element as it is in memory -> the value."""
    return f"tw_from_{HALVES[dtype]}({text})" if dtype in HALVES else text


def stored(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """A value -> the element as it is in memory; rounds as a cast does."""
    if target in HALVES:
        return f"tw_to_{HALVES[target]}({converted(text, source, torch.float32)})"
    return converted(text, source, target)


def converted(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """The cast of the IR: truncates to integers, compares with 0 for bool, rounds 16-bit floats to nearest even."""
    if source == target:
        return text
    if target in HALVES:
        narrow = text if value_type(source) == "float" else f"(float)({text})"
        return f"tw_round_{HALVES[target]}({narrow})"
    if target == torch.bool:
        return f"({text} != 0)"
    if value_type(source) == value_type(target):
        return text
    if source.is_floating_point and not target.is_floating_point:
        if target == torch.int32 and value_type(source) == "float":
            return f"tw_to_int32({text})"
        whole = f"tw_to_int({text})"
        return whole if target == torch.int64 else f"({storage_type(target)}){whole}"
    return f"({value_type(target)}){_atom(text)}"


def _atom(text: str) -> str:
    return text if re.fullmatch(r"[\w.]+", text) or is_wrapped(text) else f"({text})"


def is_wrapped(text: str) -> bool:
    """Whether the first bracket of `text` closes at its very end."""
    if not text.startswith("("):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position == len(text) - 1
    return False


def unwrapped(text: str) -> str:
    """`text` without the brackets around all of it."""
    return text[1:-1] if is_wrapped(text) else text


def literal(value: float | int | bool, dtype: torch.dtype) -> str:
    """A C++ literal of the value, rounded to `dtype` first."""
    if dtype == torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        number = int(value)
        if number == -(1 << 63):
            return f"({number + 1}l - 1)"
        suffix = "l" if abs(number) >= 1 << 31 else ""
        return f"({number}{suffix})" if number < 0 else f"{number}{suffix}"
    single = dtype != torch.float64
    kind = "f" if single else ""
    real = float(value)
    if dtype in HALVES:
        real = float(torch.tensor(real, dtype=torch.float64).to(dtype))
    if single and math.isfinite(real):
        with np.errstate(over="ignore"):
            real = float(np.float32(real))
    if math.isnan(real):
        return f'__builtin_nan{kind}("")'
    if math.isinf(real):
        return f"{'-' if real < 0 else ''}__builtin_inf{kind}()"
    text = str(np.float32(real)) if single else repr(real)
    text = text if "." in text or "e" in text else text + ".0"
    return f"({text}{kind})" if text.startswith("-") else f"{text}{kind}"
