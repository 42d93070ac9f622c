"""Find a C++ compiler, turn header-free C++ into a shared object, load it.

A long program comes as several units as well, which are compiled side by side and linked; what was built before is
looked for under the program as a whole.

A compiler is a program of somebody else: it may hang, crash, claim success and write nothing, or write
what is no library. Each of these ends in a `ToolchainError` of one line that names the kept source and
log; the caller then runs the graph eagerly. A result is accepted only if it is a whole ELF library for
this machine.

Results are cached under a key over everything that decides them: source, flags, the compiler's path,
version and date, the features of this CPU (`-march=native` means something else elsewhere), the C
library and our version. `TORCHWELD_ISA` (codegen/instructions.py) is among the flags.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import struct
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torchweld.codegen.cache import Cache, make_key
from torchweld.codegen.compiler_process import build_library, run, tail
from torchweld.codegen.instructions import InstructionsError, chosen_path, cpu_features, target_flags
from torchweld.codegen.private_folder import FolderError, private_scratch

BASE_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared")

_VERSION_SECONDS: Final = 10.0
_FAILURES: Final = "failures"
# Linking with these makes GCC set flush-to-zero for the whole process, torch included.
_FORBIDDEN_FLAGS: Final = ("-ffast-math", "-Ofast", "-funsafe-math-optimizations")


class ToolchainError(RuntimeError):
    """A compiler or its product failed. One line; `kept` is the folder with source and log, or None."""

    def __init__(self, message: str, kept: Path | None = None) -> None:
        super().__init__(message)
        self.kept = kept


class ToolchainWarning(UserWarning):
    """A compiler was named but cannot be used; another one is."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answered `--version`.

    command: what to run, without flags. version: its own first line. changed_ns: modification time of
    the program. target_flags: ask for the instructions of this machine.
    """

    command: tuple[str, ...]
    version: str
    changed_ns: int
    target_flags: tuple[str, ...]

    def identity(self) -> str:
        """What of the compiler decides its output; part of every cache key."""
        return "\n".join((*self.command, self.version, str(self.changed_ns), *self.target_flags))


def find_compiler() -> Compiler | None:
    """The first that works of $CXX (with arguments), g++, c++, clang++, `python -m ziglang c++`; or None.

    A $CXX that cannot be run gives a ToolchainWarning and the next one. Raises ToolchainError for a $TORCHWELD_ISA that
    this CPU cannot run.
    """
    try:
        target = target_flags(chosen_path())
    except InstructionsError as error:
        raise ToolchainError(str(error)) from error
    wished = os.environ.get("CXX", "").strip()
    if wished:
        if (compiler := _examine(_split_command(wished), target)) is not None:
            return compiler
        warnings.warn(
            f"CXX={wished!r} cannot be run as a compiler; trying others", ToolchainWarning, stacklevel=2
        )
    for name in ("g++", "c++", "clang++"):
        if (compiler := _examine((name,), target)) is not None:
            return compiler
    if importlib.util.find_spec("ziglang") is not None:
        # Without its C++ library, which we do not use and which it would build first (over a minute).
        # It writes the names of its targets with underscores.
        target = tuple(flag.replace("x86-64", "x86_64").replace("64-v", "64_v") for flag in target)
        return _examine((sys.executable, "-m", "ziglang", "c++"), (*target, "-nostdlib++"))
    return None


def compile_shared(
    source: str,
    *,
    cache: Cache,
    flags: Sequence[str] = (),
    compiler: Compiler | None = None,
    time_limit: float = 60.0,
    name: str = "unit",
    parts: Sequence[str] = (),
) -> Path:
    """Compile header-free C++ to a shared object and return its verified path in the cache.

    parts: the same program as units of their own, compiled side by side. flags follow `BASE_FLAGS` and the compiler's
    target flags, so a later `-march` wins. time_limit is in seconds; after it the compiler's whole process group is
    killed. Raises ToolchainError (no compiler, failure of any kind, no disk space; it names the function at fault
    where the compiler does) and ValueError for a flag that would change the arithmetic of the whole process.
    """
    for flag in flags:
        if flag in _FORBIDDEN_FLAGS:
            raise ValueError(
                f"flag {flag} sets flush-to-zero for the whole process; name single options instead"
            )
    compiler = compiler or find_compiler()
    if compiler is None:
        raise ToolchainError("no C++ compiler: install g++ or clang++, set CXX, or `pip install ziglang`")
    command = (*compiler.command, *BASE_FLAGS, *compiler.target_flags, *flags)
    key = make_key("shared object", source, *command, compiler.identity(), _machine_identity())
    meta = {
        "name": name,
        "compiler": compiler.version,
        "command": shlex.join(command),
        "machine": platform.machine(),
    }

    def build(product: Path) -> None:
        units = tuple(parts) or (source,)
        log = product.with_name("compiler.log")
        try:
            problem = build_library(command, units, product, log, time_limit)
        except OSError as error:
            raise ToolchainError(f"compiling {name!r}: {command[0]}: {error.strerror or error}") from error
        if problem is not None:
            kept = _keep(cache, source if problem.unit is None else units[problem.unit], log)
            where = f"; source and log: {kept}" if kept else ""
            what = f"{problem.function!r} of {name!r}" if problem.function else repr(name)
            raise ToolchainError(f"compiling {what}: {command[0]} {problem.text}{where}", kept)

    try:
        return cache.get_or_build(key, ".so", build, meta)
    except FolderError as error:
        raise ToolchainError(f"compiling {name!r}: {error}") from error


def load(path: Path, symbols: Sequence[str] = ()) -> ctypes.CDLL:
    """Load a shared object that the cache has verified, and check that it defines `symbols`.

    The path must come from `Cache` or `compile_shared`: between their check of the digest and this call
    only this user can change the folder. Raises ToolchainError.
    """
    try:
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise ToolchainError(f"{path.name} cannot be loaded: {error}") from error
    for symbol in symbols:
        if not hasattr(library, symbol):
            raise ToolchainError(
                f"{path.name} does not define {symbol!r}; clear the cache: torchweld cache clear"
            )
    return library


def _split_command(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError:
        return (text,)


def _examine(command: tuple[str, ...], target: tuple[str, ...]) -> Compiler | None:
    program = shutil.which(command[0])
    if program is None:
        return None
    command = (os.path.abspath(program), *command[1:])  # it runs in another folder
    try:
        with private_scratch() as scratch:
            log = scratch / "version"
            if run([(*command, "--version")], [log], _VERSION_SECONDS, scratch) != [0]:
                return None
            version = tail(log).strip().partition("\n")[0]
        return Compiler(command, version, os.stat(command[0]).st_mtime_ns, target)
    except OSError:
        return None


@functools.cache
def _machine_identity() -> str:
    try:
        version = importlib.metadata.version("torchweld")
    except importlib.metadata.PackageNotFoundError:
        version = "source"
    features = " ".join(sorted(cpu_features()))
    parts = (
        platform.system(),
        platform.machine(),
        *platform.libc_ver(),
        str(struct.calcsize("P")),
        version,
        features,
    )
    return "\n".join(parts)


def _keep(cache: Cache, source: str, log: Path) -> Path | None:
    """Leave source and log of a failure beside the cache's entries, one folder per source."""
    folder = cache.folder / _FAILURES / make_key(source)[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "unit.cpp").write_text(source)
        (folder / "compiler.log").write_text(tail(log))
    except OSError:
        return None
    return folder
