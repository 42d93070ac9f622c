"""Which instructions kernels may use: all of this CPU, or fewer on request, to test the paths of other CPUs.

    native    what the compiler finds on this CPU; the default
    avx512    without AMX: AVX-512, with VNNI and bfloat16 where the CPU has them
    avx2      AVX2, FMA and float16 conversions, 256 bits (x86-64-v3)
    portable  what every CPU of this kind has (x86-64: SSE2): plain C++ that the compiler vectorizes

The choice is in the compiler's flags only, so the headers in runtime/ see it as they see another CPU, and every key of
the cache that covers the flags covers it.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Final

ISA_VARIABLE: Final = "TORCHWELD_ISA"
PATHS: Final = ("native", "avx512", "avx2", "portable")

_FLAGS: Final = {
    "native": ("-march=native",),
    "avx512": ("-march=native", "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"),
    "avx2": ("-march=x86-64-v3",),
    "portable": ("-march=x86-64",),
}
_NEEDED: Final = {"avx512": ("avx512f",), "avx2": ("avx2", "fma", "f16c")}


class InstructionsError(ValueError):
    """The value of TORCHWELD_ISA means nothing, or names instructions that this CPU does not have."""


def chosen_path() -> str:
    """The path that TORCHWELD_ISA names, "native" if it is not set. Raises InstructionsError."""
    return check_path(os.environ.get(ISA_VARIABLE, "").strip() or "native")


def check_path(path: str) -> str:
    """`path` if this CPU can take it. Raises InstructionsError."""
    if path not in PATHS:
        raise InstructionsError(f"{ISA_VARIABLE}={path}: expected one of {', '.join(PATHS)}")
    missing = [feature for feature in _NEEDED.get(path, ()) if feature not in cpu_features()]
    if missing:
        raise InstructionsError(f"{ISA_VARIABLE}={path}: this CPU has no {', '.join(missing)}")
    return path


def target_flags(path: str) -> tuple[str, ...]:
    """What g++ and clang++ are told; other architectures than x86-64 have no names for their least common part."""
    if path == "portable" and platform.machine() != "x86_64":
        return ()
    return _FLAGS[path]


@functools.cache
def cpu_features() -> frozenset[str]:
    """The CPU's instruction-set features as Linux names them (avx512_vnni, asimd); empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features", "isa"):
            return frozenset(value.split())
    return frozenset()
