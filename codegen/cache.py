"""The kernel cache on disk: nobody else can write to it, and no byte leaves it unverified.

A shared object in a cache is code that the process will run, so a cache that another user can write to
is a way to run code as this user (CVE-2025-69872 and its kin). Hence the rules:

* The folder is `$TORCHWELD_CACHE_DIR` or the user's cache folder, mode 0700. If another user could write
  to it or to a folder above it, or if it is a symbolic link, it is refused: one warning, and a private
  temporary folder instead.
* An entry is two files, `KEY.json` (a header with the digest, size and facts of the build) and
  `KEY.DIGEST.SUFFIX` (the bytes). Each is written under a fresh name with O_EXCL, synced and renamed,
  the header last: a reader sees a whole entry or none. The payload's name carries its digest, so no
  payload ever changes under its name.
* `get` recomputes the digest of every byte before it returns a path. What differs is deleted and counts
  as a miss. Between that check and the load only this user (and root) can touch the folder, which is
  what closes the gap.
* One builder per key: an advisory lock (flock), which dies with its process. A lock that cannot be had
  costs a second build, never a wrong entry.
* A full disk or a read-only folder costs one warning; the entry goes to the private temporary folder.

Nothing is unpickled: headers are JSON, payloads are bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import filelock
import platformdirs

from torchweld.codegen.private_folder import (
    FolderError,
    make_folder,
    private_scratch,
    process_folder,
    why_unsafe,
)

log = logging.getLogger(__name__)

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

FOLDER_VARIABLE: Final = "TORCHWELD_CACHE_DIR"

_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SUFFIX: Final = re.compile(r"\.[a-z0-9]{1,12}")
_PAYLOAD: Final = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.[a-z0-9]{1,12}")
_TEMPORARY: Final = "new-"
_LOCKS: Final = "locks"
_HEADER_LIMIT: Final = 1 << 20
# Longer than any time limit on a compiler: after it the holder is taken for stuck and the work is done twice.
_LOCK_SECONDS: Final = 300.0
_ATTEMPTS: Final = 4


class CacheWarning(UserWarning):
    """The cache works, but not where it should: refused folder, full disk, no permission."""


class CacheError(FolderError):
    """No place at all could take an entry, neither the cache folder nor a private temporary one."""


@dataclass(frozen=True)
class CacheEntry:
    """One stored entry as its header describes it (the payload is not verified by listing)."""

    key: str
    path: Path
    bytes: int
    created: float
    meta: Mapping[str, str]


@dataclass(frozen=True)
class CacheStats:
    """What the cache holds and what this object did; `refused` says why the wished folder is not used."""

    folder: Path
    entries: int
    bytes: int
    hits: int
    misses: int
    damaged: int
    refused: str | None


def make_key(*parts: str) -> str:
    """SHA-256 over the parts and their lengths, so that ("ab", "c") and ("a", "bc") differ; 64 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def cache_root() -> Path:
    """The folder asked for: `$TORCHWELD_CACHE_DIR`, else the user's. Not created, not checked."""
    wish = os.environ.get(FOLDER_VARIABLE)
    if wish:
        return Path(wish).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("torchweld"))


class Cache:
    """Entries by key in one folder; see the module for what is promised.

    Safe to use from several threads and processes. An unusable folder is replaced by a private temporary
    one that lives as long as the process, with one `CacheWarning`; CacheError is raised only if that
    cannot be made either.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._warned = False
        self._private: Path | None = None
        self._hits = self._misses = self._damaged = 0
        self.refused: str | None = None
        wished = root.absolute() if root else cache_root()
        try:
            self.folder = self._open(wished)
        except OSError as error:
            reason = str(error) if isinstance(error, FolderError) else f"{wished}: {error.strerror or error}"
            self.folder = self._private_folder()
            self._warn(
                f"the kernel cache is not used: {reason}; entries go to {self.folder} until the process "
                f"ends; set {FOLDER_VARIABLE} to a folder of your own"
            )
            self.refused = reason

    @staticmethod
    def _open(wished: Path) -> Path:
        """The folder of entries inside the wished one, made if missing; OSError if it must not be used."""
        make_folder(wished)
        if reason := why_unsafe(wished):
            raise FolderError(reason)
        # Only the path without links is used from here on, so a link that changes later changes nothing.
        folder = wished.resolve(strict=True) / "kernels"
        make_folder(folder)
        if reason := why_unsafe(folder):
            raise FolderError(reason)
        return folder

    def get(self, key: str) -> Path | None:
        """The verified payload of `key`, or None. A damaged entry is deleted and counts as missing."""
        _check_key(key)
        path = self._find(key)
        if path is None:
            self._misses += 1
        else:
            self._hits += 1
        return path

    def put(
        self,
        key: str,
        data: bytes | memoryview,
        meta: Mapping[str, str] | None = None,
        suffix: str = ".bin",
        *,
        elsewhere: bool = True,
    ) -> Path:
        """Store `data` under `key`, in place of what was there, and return the payload's path.

        Raises CacheError when neither the folder nor, if `elsewhere` is allowed, a private temporary one takes it (a
        disk full everywhere).
        """
        _check_key(key)
        if not _SUFFIX.fullmatch(suffix):
            raise ValueError(f"cache suffix {suffix!r}: expected a dot and up to 12 of a-z, 0-9")
        try:
            return _write_entry(self.folder, key, data, meta or {}, suffix)
        except OSError as error:
            first = error
        if not elsewhere:
            why = f"{self.folder} cannot be written ({first.strerror or first})"
            raise CacheError(f"no place for a cache entry of {len(data)} bytes: {why}") from first
        place = self._private_folder()
        self._warn(
            f"the kernel cache in {self.folder} cannot be written ({first.strerror or first}); using {place}"
        )
        try:
            return _write_entry(place, key, data, meta or {}, suffix)
        except OSError as error:
            text = (
                f"neither {self.folder} ({first.strerror or first}) nor {place} ({error.strerror or error})"
            )
            raise CacheError(
                f"no place for a cache entry of {len(data)} bytes: {text} can be written"
            ) from error

    def get_or_build(
        self, key: str, suffix: str, build: Callable[[Path], None], meta: Mapping[str, str] | None = None
    ) -> Path:
        """The payload of `key`, built first if it is missing or damaged.

        `build` gets a path that ends in `suffix`, in an empty private folder that is removed afterwards,
        and writes the payload there; its exceptions pass through and nothing is stored. Among several
        processes one builds.
        """
        if (path := self.get(key)) is not None:
            return path
        with self._lock(key):
            if (path := self._find(key)) is not None:  # built by the one we waited for
                return path
            with private_scratch() as scratch:
                product = scratch / f"built{suffix}"
                build(product)
                return self.put(key, product.read_bytes(), meta, suffix)

    def get_json(self, key: str) -> JsonValue:
        """The JSON value stored under `key`, or None if there is none that can be read."""
        path = self.get(key)
        if path is None:
            return None
        try:
            value: JsonValue = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return value

    def put_json(self, key: str, value: JsonValue, meta: Mapping[str, str] | None = None) -> Path:
        """Store a JSON value (no NaN or infinity: they are not JSON) under `key`."""
        data = json.dumps(value, sort_keys=True, allow_nan=False).encode()
        return self.put(key, data, meta, ".json")

    def entries(self) -> tuple[CacheEntry, ...]:
        """Every entry with a readable header and a payload of the right size, oldest first."""
        found = [entry for folder in self._folders() for entry in _list_entries(folder)]
        return tuple(sorted(found, key=lambda entry: (entry.created, entry.key)))

    def clear(self) -> int:
        """Delete all entries and what broken-off writes left; returns how many entries there were.

        Files that are not the cache's own are left alone. Shared objects already loaded stay loaded.
        """
        count = 0
        for folder in self._folders():
            count += len(_list_entries(folder))
            for file in folder.iterdir():
                if _is_header(file) or _PAYLOAD.fullmatch(file.name) or file.name.startswith(_TEMPORARY):
                    _delete(file)
        return count

    def stats(self) -> CacheStats:
        """Contents now, and this object's hits, misses and damaged entries so far."""
        entries = self.entries()
        size = sum(entry.bytes for entry in entries)
        return CacheStats(
            self.folder, len(entries), size, self._hits, self._misses, self._damaged, self.refused
        )

    def _find(self, key: str) -> Path | None:
        verified = (self._verified(folder, key) for folder in self._folders())
        return next((path for path in verified if path is not None), None)

    def _verified(self, folder: Path, key: str) -> Path | None:
        header = folder / f"{key}.json"
        if not os.path.lexists(header):
            return None
        entry = _read_header(header)
        for _ in range(_ATTEMPTS):
            if entry is not None and _digest_of(entry.path) == entry.digest:
                return entry.path
            before, entry = entry, _read_header(header)
            if entry == before:  # else it was replaced while we read, not damaged
                break
        self._damaged += 1
        log.warning("the cache entry %s is damaged: it is deleted, and made again", header)
        _delete(header)
        if entry is not None:
            _delete(entry.path)
        return None

    def _folders(self) -> tuple[Path, ...]:
        if self._private is None or self._private == self.folder:
            return (self.folder,)
        return (self.folder, self._private)

    def _private_folder(self) -> Path:
        if self._private is None:
            self._private = process_folder()
        return self._private

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, CacheWarning, stacklevel=3)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        lock: filelock.BaseFileLock | None = None
        try:
            locks = self.folder / _LOCKS
            locks.mkdir(mode=0o700, exist_ok=True)
            lock = filelock.UnixFileLock(locks / f"{key}.lock", mode=0o600)
            lock.acquire(timeout=_LOCK_SECONDS)
        except (OSError, filelock.Timeout):
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()


@dataclass(frozen=True)
class _Header:
    path: Path
    digest: str
    bytes: int
    created: float
    meta: Mapping[str, str]


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"cache key {key!r}: expected 64 hex digits from make_key()")


def _is_header(file: Path) -> bool:
    return file.suffix == ".json" and _KEY.fullmatch(file.stem) is not None


def _write_entry(
    folder: Path, key: str, data: bytes | memoryview, meta: Mapping[str, str], suffix: str
) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    payload = folder / f"{key}.{digest[:16]}{suffix}"
    header: dict[str, JsonValue] = {
        "key": key,
        "payload": payload.name,
        "sha256": digest,
        "bytes": len(data),
        "created": time.time(),
        "meta": dict(meta),
    }
    before = _read_header(folder / f"{key}.json")
    _write_whole(payload, data)
    _write_whole(folder / f"{key}.json", json.dumps(header, indent=1).encode())
    if before is not None and before.path != payload:
        _delete(before.path)
    return payload


def _write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that its name shows all of it or nothing, even after a power cut or kill -9."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)  # O_EXCL, O_NOFOLLOW, mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, path)
    except BaseException:
        _delete(Path(name))
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_header(file: Path) -> _Header | None:
    """The header if it is whole, names its own key and a payload of that key beside it; else None."""
    try:
        with _open_own(file) as handle:
            fields = json.loads(handle.read(_HEADER_LIMIT))
        name, digest, meta = fields["payload"], fields["sha256"], fields["meta"]
        size, created = int(fields["bytes"]), float(fields["created"])
        if fields["key"] != file.stem or not _PAYLOAD.fullmatch(name) or not name.startswith(file.stem):
            return None
        texts = {str(fact): str(value) for fact, value in meta.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return _Header(file.parent / name, str(digest), size, created, texts)


def _digest_of(file: Path) -> str | None:
    try:
        with _open_own(file) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError:
        return None


@contextlib.contextmanager
def _open_own(file: Path) -> Iterator[io.BufferedReader]:
    """Open a plain file of ours for reading; OSError for links, pipes and files of others."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise PermissionError(f"{file} is not a plain file that only this user can write")
        yield stream


def _list_entries(folder: Path) -> list[CacheEntry]:
    found = []
    try:
        headers = [file for file in folder.iterdir() if _is_header(file)]
    except OSError:
        return []
    for file in headers:
        header = _read_header(file)
        with contextlib.suppress(OSError):
            if header is not None and header.path.lstat().st_size == header.bytes:
                found.append(CacheEntry(file.stem, header.path, header.bytes, header.created, header.meta))
    return found


def _delete(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()
