"""The kernel cache: what is stored comes back whole or not at all, and only from a folder of our own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchweld.codegen.cache import Cache, CacheError, CacheWarning, cache_root, make_key
from torchweld.codegen.private_folder import why_unsafe

KEY = make_key("one")
DATA = bytes(range(256)) * 40

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own files as another user or to mount")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def open_refused(folder: Path) -> tuple[Cache, str]:
    """Open a cache that must be refused; the cache and the one warning's text."""
    with pytest.warns(CacheWarning) as caught:
        cache = Cache(folder)
        cache.put(KEY, DATA)
    assert len(caught) == 1
    assert cache.refused is not None
    assert folder not in cache.folder.parents
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    path = cache.get(KEY)
    assert path is not None and path.read_bytes() == DATA
    return cache, str(caught[0].message)


# Keys and values


def test_key_separates_its_parts() -> None:
    assert make_key("ab", "c") != make_key("a", "bc") != make_key("abc")
    assert make_key("a") == make_key("a")
    assert len(make_key("a", "\udc80", "ä")) == 64


def test_put_then_get(cache: Cache) -> None:
    assert cache.get(KEY) is None
    path = cache.put(KEY, DATA, {"compiler": "g++"}, ".so")
    assert cache.get(KEY) == path
    assert path.read_bytes() == DATA
    assert path.suffix == ".so"
    (entry,) = cache.entries()
    assert (entry.key, entry.path, entry.bytes, dict(entry.meta)) == (
        KEY,
        path,
        len(DATA),
        {"compiler": "g++"},
    )


def test_another_cache_object_sees_it(cache: Cache, tmp_path: Path) -> None:
    path = cache.put(KEY, DATA)
    assert Cache(tmp_path / "cache").get(KEY) == path


def test_put_replaces_and_leaves_no_orphan(cache: Cache) -> None:
    cache.put(KEY, b"old")
    path = cache.put(KEY, b"new")
    assert path.read_bytes() == b"new"
    assert sorted(file.name for file in cache.folder.iterdir()) == sorted([f"{KEY}.json", path.name])


def test_empty_payload_is_an_entry(cache: Cache) -> None:
    cache.put(KEY, b"")
    found = cache.get(KEY)
    assert found is not None and found.read_bytes() == b""


def test_json_round_trip(cache: Cache) -> None:
    value = {"read": 1.5, "names": ["a", None, True], "n": 3}
    assert cache.get_json(KEY) is None
    cache.put_json(KEY, value)
    assert cache.get_json(KEY) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        cache.put_json(KEY, float("nan"))


@pytest.mark.parametrize("key", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 65])
def test_bad_key_is_refused(cache: Cache, key: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        cache.get(key)
    with pytest.raises(ValueError, match="64 hex digits"):
        cache.put(key, DATA)


@pytest.mark.parametrize("suffix", ["", "so", "./x", ".s/o", "." + "a" * 13])
def test_bad_suffix_is_refused(cache: Cache, suffix: str) -> None:
    with pytest.raises(ValueError, match="suffix"):
        cache.put(KEY, DATA, suffix=suffix)


def test_get_or_build_builds_once(cache: Cache) -> None:
    built: list[Path] = []

    def build(product: Path) -> None:
        assert product.suffix == ".so" and list(product.parent.iterdir()) == []
        built.append(product)
        product.write_bytes(DATA)

    first = cache.get_or_build(KEY, ".so", build)
    assert cache.get_or_build(KEY, ".so", build) == first
    assert first.read_bytes() == DATA
    assert len(built) == 1 and not built[0].parent.exists()
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


def test_failed_build_stores_nothing(cache: Cache) -> None:
    def build(product: Path) -> None:
        product.write_bytes(b"half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cache.get_or_build(KEY, ".so", build)
    assert cache.get(KEY) is None
    assert cache.entries() == ()


def test_clear_leaves_foreign_files(cache: Cache) -> None:
    cache.put(KEY, DATA)
    cache.put(make_key("two"), DATA)
    foreign = cache.folder / "notes.txt"
    foreign.write_text("mine")
    (cache.folder / "new-leftover").write_bytes(b"broken off")
    assert cache.clear() == 2
    assert cache.get(KEY) is None
    assert [file.name for file in cache.folder.iterdir()] == ["notes.txt"]


# Damage


def damage_torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_emptied(path: Path) -> None:
    os.truncate(path, 0)


def damage_zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def damage_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"}")


def damage_removed(path: Path) -> None:
    path.unlink()


def damage_linked(path: Path) -> None:
    real = path.with_name("elsewhere")
    path.rename(real)
    path.symlink_to(real)


def damage_opened_to_others(path: Path) -> None:
    path.chmod(0o666)


def damage_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


DAMAGES = [
    damage_torn,
    damage_emptied,
    damage_zeroed,
    damage_one_bit,
    damage_grown,
    damage_removed,
    damage_linked,
    damage_opened_to_others,
    damage_pipe,
]


@pytest.mark.parametrize("what", ["payload", "header"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_damaged_entry_is_rebuilt(cache: Cache, damage, what: str) -> None:  # type: ignore[no-untyped-def]
    payload = cache.put(KEY, DATA, suffix=".so")
    damage(payload if what == "payload" else cache.folder / f"{KEY}.json")

    # A flipped bit in a header may hit a number that nothing depends on; the payload is verified anyway.
    found = cache.get(KEY)
    assert found is None or found.read_bytes() == DATA
    if what == "payload":
        assert found is None
        assert cache.stats().damaged == 1

    rebuilt = cache.get_or_build(KEY, ".so", lambda product: product.write_bytes(DATA) and None)
    assert rebuilt.read_bytes() == DATA
    assert rebuilt.is_file() and not rebuilt.is_symlink()
    assert Cache(cache.folder.parent).get(KEY) == rebuilt


@pytest.mark.parametrize(
    "change",
    [
        {"payload": "../../../etc/passwd"},
        {"payload": f"{make_key('other')}.0123456789abcdef.so"},
        {"payload": 7},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"key": make_key("other")},
        {"meta": [1]},
        {"bytes": "many"},
    ],
    ids=str,
)
def test_forged_header_is_a_miss(cache: Cache, change: dict[str, object]) -> None:
    cache.put(KEY, DATA)
    header = cache.folder / f"{KEY}.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    assert cache.get(KEY) is None
    assert cache.stats().damaged == 1


def test_entry_copied_to_another_key_is_a_miss(cache: Cache) -> None:
    cache.put(KEY, DATA)
    other = make_key("other")
    (cache.folder / f"{other}.json").write_bytes((cache.folder / f"{KEY}.json").read_bytes())
    assert cache.get(other) is None
    assert cache.get(KEY) is not None


@pytest.mark.parametrize("named", ["as the payload of another key", "as no payload is named"])
def test_header_cannot_name_another_file(cache: Cache, named: str) -> None:
    """Not even one whose digest it knows."""
    cache.put(KEY, DATA)
    stranger = cache.put(make_key("other"), b"other")
    if named == "as no payload is named":
        stranger = stranger.rename(cache.folder / f"{KEY}.txt")
    header = cache.folder / f"{KEY}.json"
    change = {"payload": stranger.name, "sha256": hashlib.sha256(b"other").hexdigest(), "bytes": 5}
    header.write_text(json.dumps(json.loads(header.read_text()) | change))
    assert cache.get(KEY) is None


# Whose folder


def test_folder_is_ours_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a" / "b")
    cache.put(KEY, DATA)
    for folder in (tmp_path / "a", tmp_path / "a" / "b", cache.folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in cache.folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
    assert cache.refused is None


def test_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(tmp_path / "wish"))
    assert cache_root() == tmp_path / "wish"
    assert Cache().folder.parent == tmp_path / "wish"
    monkeypatch.delenv("TORCHWELD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "torchweld"


def test_world_writable_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    _, text = open_refused(folder)
    assert "can be written by other users" in text and "TORCHWELD_CACHE_DIR" in text
    assert list(folder.iterdir()) == []


def test_world_writable_inner_folder_is_refused(tmp_path: Path) -> None:
    Cache(tmp_path / "cache").folder.chmod(0o777)
    open_refused(tmp_path / "cache")


def test_world_writable_parent_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "open"
    parent.mkdir()
    parent.chmod(0o777)
    (parent / "cache").mkdir(mode=0o700)
    _, text = open_refused(parent / "cache")
    assert f"{parent}, above the cache folder" in text


def test_sticky_parent_is_accepted(tmp_path: Path) -> None:
    parent = tmp_path / "sticky"
    parent.mkdir()
    parent.chmod(0o1777)
    assert Cache(parent / "cache").refused is None


def test_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _, text = open_refused(tmp_path / "link")
    assert "is a symbolic link" in text
    assert list((tmp_path / "real").iterdir()) == []


def test_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    open_refused(tmp_path / "link")
    assert not (tmp_path / "nothing").exists()


def test_own_link_above_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    cache = Cache(tmp_path / "link" / "cache")
    assert cache.refused is None
    assert cache.folder == tmp_path.resolve() / "real" / "cache" / "kernels"


def test_link_into_an_unsafe_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open" / "inner").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "inner")
    open_refused(tmp_path / "link" / "cache")


@as_root
def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    _, text = open_refused(folder)
    assert f"{folder} belongs to user" in text
    assert (why_unsafe(folder) or "").startswith(f"{folder} belongs to user")


@as_root
def test_link_of_another_user_above_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    _, text = open_refused(tmp_path / "link" / "cache")
    assert "belongs to user" in text


@as_root
def test_group_writable_folder_is_refused_unless_the_group_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o770)
    assert why_unsafe(folder) is None  # root's own group
    os.chown(folder, 0, 100)
    assert "other users" in (why_unsafe(folder) or "")


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, text = open_refused(tmp_path / "file" / "cache")
    assert "Not a directory" in text


# Writes that fail


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 64 KB mounted on the folder."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@as_root
def test_full_disk_falls_back_and_warns_once(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    with small_disk(folder):
        cache = Cache(folder)
        cache.put(make_key("small"), b"fits")
        with pytest.warns(CacheWarning, match="No space left on device") as caught:
            path = cache.put(KEY, bytes(1 << 20), suffix=".so")
            cache.put(make_key("three"), bytes(1 << 20))
        assert len(caught) == 1
        assert folder not in path.parents
        assert cache.get(KEY) == path
        assert cache.get(make_key("small")) is not None
        assert len(cache.entries()) == 3
        assert not [file for file in cache.folder.iterdir() if file.name.startswith("new-")]
        assert cache.clear() == 3


@as_root
def test_read_only_disk_is_read_and_falls_back_for_writing(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    with small_disk(folder):
        Cache(folder).put(KEY, b"stored")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        cache = Cache(folder)
        assert cache.refused is None
        found = cache.get(KEY)
        assert found is not None and found.read_bytes() == b"stored"
        with pytest.warns(CacheWarning, match="Read-only file system"):
            path = cache.get_or_build(
                make_key("two"), ".so", lambda product: product.write_bytes(b"x") and None
            )
        assert folder not in path.parents and path.read_bytes() == b"x"


NO_ROOM = """
import resource, sys
from pathlib import Path
from torchweld.codegen.cache import Cache, CacheError, make_key
cache = Cache(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    cache.put(make_key("one"), bytes(100_000))
except CacheError as error:
    print(error)
"""


def test_no_room_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NO_ROOM, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("no place for a cache entry of 100000 bytes") and run.stdout.count("\n") == 1
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


def test_cache_error_is_an_os_error() -> None:
    assert issubclass(CacheError, OSError)


def test_private_folder_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from torchweld.codegen.cache import Cache, make_key\n"
        "cache = Cache(Path(sys.argv[1])); cache.put(make_key('a'), b'a'); print(cache.folder, flush=True)\n"
        "child = os.fork()\n"
        "if child == 0: sys.exit(0)\n"
        "os.waitpid(child, 0); assert cache.get(make_key('a')) is not None"
    )
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "file" / "cache")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not Path(run.stdout.splitlines()[0]).exists()


# Several processes


def _build_slowly(root: Path, marks: Path, barrier: multiprocessing.Barrier) -> None:  # type: ignore[valid-type]
    def build(product: Path) -> None:
        (marks / str(os.getpid())).write_text("")
        time.sleep(0.3)
        product.write_bytes(DATA)

    cache = Cache(root)
    barrier.wait()  # type: ignore[attr-defined]
    assert cache.get_or_build(KEY, ".so", build).read_bytes() == DATA


def test_four_processes_build_a_cold_key_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    marks = tmp_path / "marks"
    marks.mkdir()
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_build_slowly, args=(tmp_path / "cache", marks, barrier)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(marks.iterdir())) == 1
    assert len(Cache(tmp_path / "cache").entries()) == 1


KILLED = """
import sys, time
from pathlib import Path
from torchweld.codegen.cache import Cache, make_key
def build(product):
    product.write_bytes(b"half")
    print("building", flush=True)
    time.sleep(60)
Cache(Path(sys.argv[1])).get_or_build(make_key("one"), ".so", build)
"""


def test_killed_builder_frees_the_key(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"building\n"
        process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    cache = Cache(tmp_path / "cache")
    path = cache.get_or_build(KEY, ".so", lambda product: product.write_bytes(DATA) and None)
    assert path.read_bytes() == DATA
    assert time.monotonic() - start < 5


def test_writers_and_readers_never_see_half(tmp_path: Path) -> None:
    """One process replaces an entry over and over while this one reads: every hit is whole."""
    code = (
        "import sys; from pathlib import Path; from torchweld.codegen.cache import Cache, make_key\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "for n in range(60): cache.put(make_key('one'), bytes([n % 7]) * 200_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cache")])
    cache = Cache(tmp_path / "cache")
    hits = 0
    while writer.poll() is None:
        path = cache.get(KEY)
        with contextlib.suppress(FileNotFoundError):
            if path is not None:
                data = path.read_bytes()
                assert len(data) == 200_000 and len(set(data)) == 1
                hits += 1
    assert writer.returncode == 0
    assert hits > 0
    assert cache.stats().damaged == 0


def test_good_use_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = Cache(tmp_path / "cache")
        cache.put(KEY, DATA)
        assert cache.get(KEY) is not None
