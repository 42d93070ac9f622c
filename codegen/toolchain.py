"""Find a C++ compiler, turn header-free C++ into a shared object, load it.

A compiler is a program of somebody else: it may hang, crash, claim success and write nothing, or write
what is no library. Each of these ends in a `ToolchainError` of one line that names the kept source and
log; the caller then runs the graph eagerly. A result is accepted only if it is a whole ELF library for
this machine.

Results are cached under a key over everything that decides them: source, flags, the compiler's path,
version and date, the features of this CPU (`-march=native` means something else elsewhere), the C
library and our version.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from torchweld.codegen.cache import Cache, make_key
from torchweld.codegen.private_folder import FolderError, private_scratch

BASE_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared")

_VERSION_SECONDS: Final = 10.0
_LOG_TAIL: Final = 1 << 16
_FAILURES: Final = "failures"
# Linking with these makes GCC set flush-to-zero for the whole process, torch included.
_FORBIDDEN_FLAGS: Final = ("-ffast-math", "-Ofast", "-funsafe-math-optimizations")
_ELF_MACHINES: Final[Mapping[str, int]] = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "ppc64le": 21}


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


@dataclass(frozen=True)
class Unit:
    """One translation unit: name for messages, header-free C++, flags beyond the common ones."""

    name: str
    source: str
    flags: tuple[str, ...] = ()


def find_compiler() -> Compiler | None:
    """The first that works of $CXX (with arguments), g++, c++, clang++, `python -m ziglang c++`; or None.

    A $CXX that cannot be run gives a ToolchainWarning and the next one.
    """
    wished = os.environ.get("CXX", "").strip()
    if wished:
        if (compiler := _examine(_split_command(wished))) is not None:
            return compiler
        warnings.warn(
            f"CXX={wished!r} cannot be run as a compiler; trying others", ToolchainWarning, stacklevel=2
        )
    for name in ("g++", "c++", "clang++"):
        if (compiler := _examine((name,))) is not None:
            return compiler
    if importlib.util.find_spec("ziglang") is not None:
        # Without its C++ library, which we do not use and which it would build first (over a minute).
        return _examine((sys.executable, "-m", "ziglang", "c++"), ("-march=native", "-nostdlib++"))
    return None


def compile_shared(
    source: str,
    *,
    cache: Cache,
    flags: Sequence[str] = (),
    compiler: Compiler | None = None,
    time_limit: float = 60.0,
    name: str = "unit",
) -> Path:
    """Compile header-free C++ to a shared object and return its verified path in the cache.

    flags follow `BASE_FLAGS` and the compiler's target flags, so a later `-march` wins. time_limit is in
    seconds; after it the compiler's whole process group is killed. Raises ToolchainError (no compiler,
    failure of any kind, no disk space) and ValueError for a flag that would change the arithmetic of the
    whole process.
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
        _run_compiler(command, source, product, cache, name, time_limit)

    try:
        return cache.get_or_build(key, ".so", build, meta)
    except FolderError as error:
        raise ToolchainError(f"compiling {name!r}: {error}") from error


def compile_many(
    units: Sequence[Unit],
    *,
    cache: Cache,
    compiler: Compiler | None = None,
    time_limit: float = 60.0,
    jobs: int | None = None,
) -> tuple[Path, ...]:
    """Compile units side by side, `jobs` at a time (default: the cores this process may use); paths in order.

    All are tried; the error of the first one that failed is raised at the end.
    """
    compiler = compiler or find_compiler()
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        futures = [
            pool.submit(
                compile_shared,
                unit.source,
                cache=cache,
                flags=unit.flags,
                compiler=compiler,
                time_limit=time_limit,
                name=unit.name,
            )
            for unit in units
        ]
    return tuple(future.result() for future in futures)


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


def _split_command(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError:
        return (text,)


def _examine(command: tuple[str, ...], target_flags: tuple[str, ...] = ("-march=native",)) -> Compiler | None:
    program = shutil.which(command[0])
    if program is None:
        return None
    command = (os.path.abspath(program), *command[1:])  # it runs in another folder
    try:
        with private_scratch() as scratch:
            log = scratch / "version"
            if _run((*command, "--version"), log, _VERSION_SECONDS, scratch) != 0:
                return None
            version = _tail(log).strip().partition("\n")[0]
        return Compiler(command, version, os.stat(command[0]).st_mtime_ns, target_flags)
    except (OSError, subprocess.TimeoutExpired):
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


def _run_compiler(
    command: tuple[str, ...], source: str, product: Path, cache: Cache, name: str, time_limit: float
) -> None:
    """Compile in the product's private folder and check what came out."""
    unit, log = product.with_name("unit.cpp"), product.with_name("compiler.log")
    try:
        unit.write_text(source)
        status = _run((*command, "-o", product.name, unit.name), log, time_limit, product.parent)
    except OSError as error:
        raise ToolchainError(f"compiling {name!r}: {command[0]}: {error.strerror or error}") from error
    except subprocess.TimeoutExpired:
        problem: str | None = f"was stopped after {time_limit:g} s"
    else:
        problem = _why_failed(status, log) or why_no_library(product)
    if problem is not None:
        kept = _keep(cache, source, log)
        where = f"; source and log: {kept}" if kept else ""
        raise ToolchainError(f"compiling {name!r}: {command[0]} {problem}{where}", kept)


def _run(command: Sequence[str], log: Path, time_limit: float, folder: Path) -> int:
    """Run in a process group of its own, output to a file; kill the group on the time limit or an interrupt.

    A pipe would not do: a grandchild that holds it open would keep us waiting after the kill.
    """
    environment = os.environ | {
        "LC_ALL": "C",
        "TMPDIR": str(folder),
        "ZIG_LOCAL_CACHE_DIR": str(folder / "zig"),
    }
    with open(log, "wb") as output:
        process = _start(command, output, folder, environment)
        try:
            return process.wait(time_limit)
        except BaseException:
            # Not reaped yet, so the number still names this group and no other.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def _start(
    command: Sequence[str], output: IO[bytes], folder: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def _why_failed(status: int, log: Path) -> str | None:
    if status == 0:
        return None
    # A driver such as g++ reports the crash of the compiler proper in its log and exits with 1 or 4.
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    if status < 0:
        return f"was killed by {_signal_name(-status)}"
    return f"exited with {status}: {first[:200]}" if first else f"exited with {status} and said nothing"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def why_no_library(path: Path) -> str | None:
    """Why the file is not a whole ELF shared library for this machine, or None if it is.

    A cut file with a good header would be mapped and then kill the process with SIGBUS, so every
    loadable segment must lie inside the file. Source: System V ABI, chapters 4 and 5.
    """
    if not os.path.lexists(path):
        return "reported success and wrote nothing"
    if path.is_symlink() or not path.is_file():
        return "reported success and wrote no plain file"
    data = path.read_bytes()
    if not data:
        return "reported success and wrote an empty file"
    if len(data) < 64 or data[:4] != b"\x7fELF":
        return "reported success and wrote something that is no ELF file"
    if (
        data[4] != struct.calcsize("P") // 4
        or data[4] != 2
        or data[5] != (1 if sys.byteorder == "little" else 2)
    ):
        return "wrote an ELF file of another word size or byte order"
    kind, machine = struct.unpack_from("=HH", data, 16)
    if kind != 3 or machine != _ELF_MACHINES.get(platform.machine(), machine):
        return (
            f"wrote an ELF file of type {kind} for machine {machine}, not a library for {platform.machine()}"
        )
    table = struct.unpack_from("=Q", data, 32)[0]
    entry, count = struct.unpack_from("=HH", data, 54)
    if count == 0 or entry < 56 or table + entry * count > len(data):
        return "wrote an ELF file whose program headers are cut off"
    for at in range(table, table + entry * count, entry):
        segment, _, offset, _, _, size = struct.unpack_from("=IIQQQQ", data, at)
        if segment == 1 and offset + size > len(data):
            return f"wrote an ELF file that is cut off at {len(data)} bytes"
    return None


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        return file.read().decode(errors="replace")
    return ""


def _keep(cache: Cache, source: str, log: Path) -> Path | None:
    """Leave source and log of a failure beside the cache's entries, one folder per source."""
    folder = cache.folder / _FAILURES / make_key(source)[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "unit.cpp").write_text(source)
        (folder / "compiler.log").write_text(_tail(log))
    except OSError:
        return None
    return folder
