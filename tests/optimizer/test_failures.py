"""Any exception becomes one line and an exit code."""

import errno
import os

import pytest
import torch

from torchweld.codegen.cache import CacheError
from torchweld.codegen.toolchain import ToolchainError
from torchweld.graph.capture_errors import CaptureError
from torchweld.models.errors import ModelFileError
from torchweld.optimizer.environment import SettingError
from torchweld.optimizer.failures import BAD_INPUT, INTERRUPTED, OUR_FAULT, explain, one_line


@pytest.mark.parametrize(
    "problem",
    [
        ModelFileError("a.gguf", "bad magic", "GGUF", "get another file"),
        CaptureError("control flow", "m.py:3: if x > 0:", "no branch", "use torch.where"),
        CacheError("no place for a cache entry"),
        ToolchainError("compiling 'unit':\n  g++ was stopped"),
        SettingError("TORCHWELD_FUEL=x: expected a number"),
    ],
)
def test_our_own_errors_are_shown_as_they_are(problem: Exception) -> None:
    failure = explain(problem)
    assert failure.code == BAD_INPUT
    assert failure.line == " ".join(str(problem).split())


def test_full_disk() -> None:
    failure = explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/a.cpp"))
    assert failure.code == BAD_INPUT
    assert failure.line.startswith("out/a.cpp: the disk is full; ")


def test_unreadable_file() -> None:
    failure = explain(PermissionError(errno.EACCES, "Permission denied", "secret"))
    assert (failure.code, failure.line) == (BAD_INPUT, "secret: Permission denied")


def test_absent_device_as_torch_reports_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises((RuntimeError, AssertionError)) as caught:
        torch.zeros(1, device="cuda")
    failure = explain(caught.value)
    assert failure.code == BAD_INPUT
    assert failure.line.startswith("a device that is not there: ")


def test_unknown_device_as_torch_reports_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(1, device="gpu")
    assert explain(caught.value).line.startswith("a device that is not there: ")


def test_too_much_memory_as_torch_reports_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    failure = explain(caught.value)
    assert failure.code == BAD_INPUT
    assert failure.line.startswith("not enough memory")


def test_anything_else_is_our_fault_and_says_where() -> None:
    try:
        {}["missing"]  # type: ignore[index]
    except KeyError as problem:
        failure = explain(problem)
    assert failure.code == OUR_FAULT
    assert "internal error KeyError at test_failures.py:" in failure.line
    assert "TORCHWELD_LOGS" in failure.line


def test_interrupt() -> None:
    assert explain(KeyboardInterrupt()).code == INTERRUPTED


def test_one_line_is_one_line_and_short() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert len(one_line("x" * 10_000)) <= 600
