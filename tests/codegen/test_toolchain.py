"""The C++ toolchain: it compiles, and every way in which a compiler can fail is one clear error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchweld.codegen.cache import Cache
from torchweld.codegen.compiler_process import function_at_fault, why_no_library
from torchweld.codegen.instructions import cpu_features
from torchweld.codegen.toolchain import (
    Compiler,
    ToolchainError,
    ToolchainWarning,
    _machine_identity,
    compile_shared,
    find_compiler,
    load,
)

ADD_ONE = 'extern "C" int add_one(int x) { return x + 1; }\n'

REAL = find_compiler()
needs_compiler = pytest.mark.skipif(REAL is None, reason="no C++ compiler here")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def script(folder: Path, body: str, name: str = "fakecc") -> Path:
    """A program that answers --version and otherwise does as `body` says; $out is the file asked for."""
    path = folder / name
    path.write_text(
        "#!/bin/sh\n"
        "while [ $# -gt 0 ]; do\n"
        '  if [ "$1" = --version ]; then echo "fake 1.0"; exit 0; fi\n'
        '  if [ "$1" = -o ]; then out="$2"; fi\n'
        "  shift\n"
        "done\n" + body + "\n"
    )
    path.chmod(0o700)
    return path


def fake(folder: Path, body: str) -> Compiler:
    return Compiler((str(script(folder, body)),), "fake 1.0", 0, ())


def fails(cache: Cache, compiler: Compiler, time_limit: float = 20.0) -> ToolchainError:
    """Compile, expect failure; the message is one line, source and log are kept, nothing is stored."""
    with pytest.raises(ToolchainError) as caught:
        compile_shared(ADD_ONE, cache=cache, compiler=compiler, time_limit=time_limit, name="decoder")
    assert "\n" not in str(caught.value)
    assert "'decoder'" in str(caught.value) and compiler.command[0] in str(caught.value)
    assert cache.entries() == ()
    assert caught.value.kept is not None and str(caught.value.kept) in str(caught.value)
    assert (caught.value.kept / "unit.cpp").read_text() == ADD_ONE
    assert (caught.value.kept / "compiler.log").is_file()
    return caught.value


# It works


@needs_compiler
def test_compile_load_call(cache: Cache) -> None:
    path = compile_shared(ADD_ONE, cache=cache)
    assert path.suffix == ".so" and cache.folder in path.parents
    assert load(path, ["add_one"]).add_one(41) == 42


@needs_compiler
def test_second_time_runs_no_compiler(cache: Cache, tmp_path: Path) -> None:
    assert REAL is not None
    count = tmp_path / "count"
    compiler = fake(tmp_path, f'echo x >> "{count}"\n' + compile_line())
    first = compile_shared(ADD_ONE, cache=cache, compiler=compiler)
    assert compile_shared(ADD_ONE, cache=cache, compiler=compiler) == first
    assert count.read_text() == "x\n"


@needs_compiler
@pytest.mark.parametrize("damage", [0, 1, 100, 4096])
def test_damaged_object_is_compiled_again(cache: Cache, damage: int) -> None:
    path = compile_shared(ADD_ONE, cache=cache)
    os.truncate(path, damage)
    again = compile_shared(ADD_ONE, cache=cache)
    assert load(again, ["add_one"]).add_one(1) == 2
    assert cache.stats().damaged == 1


@needs_compiler
def test_key_covers_source_flags_and_compiler(cache: Cache, tmp_path: Path) -> None:
    assert REAL is not None
    newer = Compiler(REAL.command, REAL.version, REAL.changed_ns + 1, REAL.target_flags)
    other = Compiler(REAL.command, REAL.version + "x", REAL.changed_ns, REAL.target_flags)
    generic = Compiler(REAL.command, REAL.version, REAL.changed_ns, ())
    for compiler in (REAL, newer, other, generic):
        compile_shared(ADD_ONE, cache=cache, compiler=compiler)
    compile_shared(ADD_ONE, cache=cache, compiler=REAL, flags=["-DX"])
    compile_shared(ADD_ONE + "// changed\n", cache=cache, compiler=REAL)
    assert len(cache.entries()) == 6


@needs_compiler
def test_key_covers_the_machine(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder on a shared disk must not serve this CPU's instructions to another."""
    compile_shared(ADD_ONE, cache=cache)
    monkeypatch.setattr("torchweld.codegen.toolchain.cpu_features", lambda: frozenset({"other"}))
    _machine_identity.cache_clear()
    try:
        compile_shared(ADD_ONE, cache=cache)
    finally:
        _machine_identity.cache_clear()
    assert len(cache.entries()) == 2


@needs_compiler
def test_entry_records_how_it_was_made(cache: Cache) -> None:
    assert REAL is not None
    compile_shared(ADD_ONE, cache=cache, compiler=REAL, name="decoder", flags=["-DX"])
    (entry,) = cache.entries()
    assert entry.meta["compiler"] == REAL.version and entry.meta["name"] == "decoder"
    assert "-DX" in entry.meta["command"]


PARTS = (ADD_ONE, 'extern "C" int add_one(int);\nextern "C" int add_two(int x) { return add_one(x) + 1; }\n')


@needs_compiler
def test_parts_become_one_library_under_the_key_of_the_whole(cache: Cache) -> None:
    path = compile_shared("".join(PARTS), cache=cache, parts=PARTS)
    assert load(path, ["add_one", "add_two"]).add_two(40) == 42
    assert compile_shared("".join(PARTS), cache=cache) == path
    assert len(cache.entries()) == 1


@needs_compiler
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_in_a_part_names_the_function_and_stores_nothing(cache: Cache, bad: int) -> None:
    parts = [f'extern "C" void f{n}() {{\nreturn;\n}}\nextern "C" void g{n}() {{\n}}\n' for n in range(3)]
    parts[bad] = parts[bad].replace("return", "missing()")
    with pytest.raises(ToolchainError, match=f"'f{bad}' of 'unit'.*missing") as caught:
        compile_shared("".join(parts), cache=cache, parts=parts)
    assert cache.entries() == ()
    assert caught.value.kept is not None
    assert f"g{bad}" in (caught.value.kept / "unit.cpp").read_text()
    assert "missing" in (caught.value.kept / "compiler.log").read_text()


@needs_compiler
def test_an_error_in_a_template_names_the_function_that_asked_for_it() -> None:
    source = 'template <class T> int f() { return T::no; }\nextern "C" void a() {}\nextern "C" void b() { f<int>(); }\n'
    log = "unit.cpp: In instantiation of x:\nunit.cpp:3:28:   required from here\nunit.cpp:1:43: error: none"
    assert function_at_fault(source, log) == "b"
    assert function_at_fault(source, "cc1plus: killed") is None


def test_parts_that_cannot_be_linked(cache: Cache) -> None:
    parts = (ADD_ONE, ADD_ONE)
    with pytest.raises(ToolchainError, match=r"compiling 'unit'.*ld returned 1"):
        compile_shared("".join(parts), cache=cache, parts=parts)
    assert cache.entries() == ()


def test_one_part_that_hangs_stops_all(cache: Cache, tmp_path: Path) -> None:
    compiler = fake(tmp_path, 'case "$out" in unit1.o) sleep 100;; *) : > "$out";; esac')
    start = time.monotonic()
    with pytest.raises(ToolchainError, match=r"was stopped after 0\.5 s"):
        compile_shared("x", cache=cache, compiler=compiler, time_limit=0.5, parts=("a", "b", "c"))
    assert time.monotonic() - start < 20 and cache.entries() == ()


@needs_compiler
def test_flags_that_change_the_process_are_refused(cache: Cache) -> None:
    for flag in ("-ffast-math", "-Ofast", "-funsafe-math-optimizations"):
        with pytest.raises(ValueError, match="flush-to-zero"):
            compile_shared(ADD_ONE, cache=cache, flags=[flag])


@needs_compiler
def test_vector_code_uses_this_machine(cache: Cache) -> None:
    source = "int avx512() {\n#ifdef __AVX512F__\n return 1;\n#else\n return 0;\n#endif\n}"
    library = load(compile_shared(f'extern "C" {source}', cache=cache))
    assert library.avx512() == ("avx512f" in cpu_features())


def test_cpu_features_are_words() -> None:
    features = cpu_features()
    assert all(feature and " " not in feature for feature in features)
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert "sse2" in features


# Finding one


def only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as if ziglang were not installed


def test_no_compiler(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, tmp_path)
    assert find_compiler() is None
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler: install"):
        compile_shared(ADD_ONE, cache=cache)


def test_order_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("clang++", "c++", "g++"):
        script(tmp_path, "exit 1", name)
        only(monkeypatch, tmp_path)
        compiler = find_compiler()
        assert compiler is not None and compiler.version == "fake 1.0"
        found.append(Path(compiler.command[0]).name)
    assert found == ["clang++", "c++", "g++"]
    wished = script(tmp_path, "exit 1", "mycc")
    monkeypatch.setenv("CXX", f"{wished} --sysroot='/a b'")
    compiler = find_compiler()
    assert compiler is not None and compiler.command == (str(wished), "--sysroot=/a b")


def test_relative_compiler_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "exit 1", "mycc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./mycc")
    compiler = find_compiler()
    assert compiler is not None and compiler.command == (str(tmp_path / "mycc"),)


def test_broken_wish_warns_and_the_next_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "exit 1", "g++")
    only(monkeypatch, tmp_path)
    for wish in ("no-such-compiler", "'unbalanced", str(tmp_path)):
        monkeypatch.setenv("CXX", wish)
        with pytest.warns(ToolchainWarning, match="trying others"):
            compiler = find_compiler()
        assert compiler is not None and compiler.command == (str(tmp_path / "g++"),)


def test_compiler_that_hangs_on_version_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchweld.codegen.toolchain._VERSION_SECONDS", 0.3)
    (tmp_path / "g++").write_text("#!/bin/sh\nwhile :; do :; done\n")
    (tmp_path / "g++").chmod(0o700)
    only(monkeypatch, tmp_path)
    assert find_compiler() is None


# Compilers that fail


def test_error_in_the_source(cache: Cache, tmp_path: Path) -> None:
    error = fails(
        cache, fake(tmp_path, 'echo "note: x"; echo "unit.cpp:1:2: error: no such thing" >&2; exit 1')
    )
    assert "exited with 1: unit.cpp:1:2: error: no such thing" in str(error)


def test_silent_failure(cache: Cache, tmp_path: Path) -> None:
    assert "exited with 3 and said nothing" in str(fails(cache, fake(tmp_path, "exit 3")))


def test_crash(cache: Cache, tmp_path: Path) -> None:
    error = fails(cache, fake(tmp_path, "echo half > $out; kill -SEGV $$"))
    assert "was killed by SIGSEGV" in str(error)


def test_hang_is_stopped_with_all_its_children(cache: Cache, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    start = time.monotonic()
    error = fails(cache, fake(tmp_path, f"sleep 300 & echo $! > {pid}\nwait"), time_limit=0.5)
    assert time.monotonic() - start < 10
    assert "was stopped after 0.5 s" in str(error)
    assert is_gone(int(pid.read_text()))


def is_gone(pid: int) -> bool:
    """Whether the process ends within 5 s (a zombie whose parent died is waited for by init)."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("exit 0", "wrote nothing"),
        (": > $out", "an empty file"),
        ("echo garbage > $out", "no ELF file"),
        ("head -c 5000 /dev/zero > $out", "no ELF file"),
        ("printf '\\177ELF' > $out", "no ELF file"),
        ("mkdir $out", "no plain file"),
        ("mkfifo $out", "no plain file"),
        ("ln -s /dev/zero $out", "no plain file"),
    ],
)
def test_lies(cache: Cache, tmp_path: Path, body: str, message: str) -> None:
    assert message in str(fails(cache, fake(tmp_path, body)))


def compile_line(output: str = "$out", *flags: str) -> str:
    assert REAL is not None
    return " ".join([*REAL.command, "-shared", "-fPIC", *flags, "-o", output, "unit.cpp"])


@needs_compiler
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("-c", "not a library"),
        ("head -c 3000", "cut off"),
        ("head -c 100", "cut off"),
        ("other machine", "for machine"),
        ("other word size", "word size"),
    ],
)
def test_wrong_objects(cache: Cache, tmp_path: Path, body: str, message: str) -> None:
    lines = {
        "-c": compile_line("$out", "-c").replace("-shared", ""),
        "head -c 3000": compile_line("whole") + " && head -c 3000 whole > $out",
        "head -c 100": compile_line("whole") + " && head -c 100 whole > $out",
        "other machine": compile_line()
        + " && printf '\\003' | dd of=$out bs=1 seek=18 conv=notrunc 2>/dev/null",
        "other word size": compile_line()
        + " && printf '\\001' | dd of=$out bs=1 seek=4 conv=notrunc 2>/dev/null",
    }
    assert message in str(fails(cache, fake(tmp_path, lines[body])))


@needs_compiler
def test_every_cut_of_a_library_that_loses_code_is_seen(cache: Cache, tmp_path: Path) -> None:
    whole = compile_shared(ADD_ONE, cache=cache).read_bytes()
    assert why_no_library(cache.entries()[0].path) is None
    for size in (0, 1, 63, 64, 500, 2000, len(whole) // 2):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:size])
        assert why_no_library(cut) is not None, size


def test_compiler_that_vanished(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="No such file"):
        compile_shared(ADD_ONE, cache=cache, compiler=Compiler((str(tmp_path / "gone"),), "1", 0, ()))


def test_after_a_failure_the_next_try_may_succeed(cache: Cache, tmp_path: Path) -> None:
    if REAL is None:
        pytest.skip("no C++ compiler here")
    switch = tmp_path / "works"
    compiler = fake(tmp_path, f"test -e {switch} || exit 1\n" + compile_line())
    fails(cache, compiler)
    switch.write_text("")
    assert load(compile_shared(ADD_ONE, cache=cache, compiler=compiler)).add_one(1) == 2


def test_kept_files_are_private(cache: Cache, tmp_path: Path) -> None:
    kept = fails(cache, fake(tmp_path, "exit 1")).kept
    assert kept is not None and stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_long_log_is_cut_to_one_line(cache: Cache, tmp_path: Path) -> None:
    body = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo 'fatal error: real cause'; exit 1"
    error = fails(cache, fake(tmp_path, body))
    assert "real cause" in str(error) and len(str(error)) < 1000


# Loading


@needs_compiler
def test_missing_symbol(cache: Cache) -> None:
    with pytest.raises(ToolchainError, match="does not define 'absent'"):
        load(compile_shared(ADD_ONE, cache=cache), ["add_one", "absent"])


@needs_compiler
def test_undefined_reference_is_found_at_load(cache: Cache) -> None:
    source = 'extern "C" int nowhere(); extern "C" int f() { return nowhere(); }'
    with pytest.raises(ToolchainError, match="undefined symbol: nowhere"):
        load(compile_shared(source, cache=cache))


def test_load_of_garbage(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"garbage")
    with pytest.raises(ToolchainError, match=r"x\.so cannot be loaded"):
        load(tmp_path / "x.so")


# Several processes


def _compile(root: Path, command: str, barrier: multiprocessing.Barrier) -> None:  # type: ignore[valid-type]
    barrier.wait()  # type: ignore[attr-defined]
    path = compile_shared(ADD_ONE, cache=Cache(root), compiler=Compiler((command,), "fake 1.0", 0, ()))
    assert load(path).add_one(1) == 2


@needs_compiler
def test_four_processes_one_cold_key(tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = script(tmp_path, f'echo x >> "{count}"; sleep 0.3\n' + compile_line())
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    arguments = (tmp_path / "cache", str(command), barrier)
    processes = [context.Process(target=_compile, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert count.read_text() == "x\n"


KILLED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may inherit it ignored
from pathlib import Path
from torchweld.codegen.cache import Cache
from torchweld.codegen.toolchain import Compiler, compile_shared
compiler = Compiler((sys.argv[2],), "fake 1.0", 0, ())
compile_shared(sys.argv[3], cache=Cache(Path(sys.argv[1])), compiler=compiler)
"""


@needs_compiler
def test_kill_during_the_build_then_rebuilt(cache: Cache, tmp_path: Path) -> None:
    started = tmp_path / "started"
    slow = f"test -e {started} || {{ : > {started}; head -c 100 /dev/zero > $out; sleep 3; exit 1; }}\n"
    compiler = fake(tmp_path, slow + compile_line())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), compiler.command[0], ADD_ONE]
    with subprocess.Popen(command) as process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert cache.entries() == ()
    assert load(compile_shared(ADD_ONE, cache=cache, compiler=compiler)).add_one(1) == 2


@needs_compiler
def test_interrupt_stops_the_compiler_and_the_next_call_works(cache: Cache, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    slow = f"test -e {pid} || {{ echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 300; }}\n"
    compiler = fake(tmp_path, slow + compile_line())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), compiler.command[0], ADD_ONE]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not pid.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in text
    assert is_gone(int(pid.read_text()))
    assert load(compile_shared(ADD_ONE, cache=cache, compiler=compiler)).add_one(1) == 2


def test_unwritable_cache_still_compiles(tmp_path: Path) -> None:
    if REAL is None:
        pytest.skip("no C++ compiler here")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="kernel cache is not used"):
        cache = Cache(tmp_path / "file" / "cache")
    assert load(compile_shared(ADD_ONE, cache=cache)).add_one(1) == 2
