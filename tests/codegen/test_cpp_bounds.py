"""No kernel touches a byte outside its buffers or its scratch memory: they end (or begin) at an unreadable page."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import mmap
import os

import pytest
import torch
from torch import Tensor

from tests.codegen.cpp_cases import quantized, random_buffers
from tests.codegen.test_cpp import matmul
from tests.codegen.test_cpp_formats import FORMATS, stored_matmul
from tests.kernels_by_hand import ALL
from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp import FLAGS, print_unit
from torchweld.codegen.ir import Kernel
from torchweld.codegen.toolchain import compile_shared, load
from torchweld.graph.index import evaluate

_libc = ctypes.CDLL(None, use_errno=True)


class Fenced:
    """Memory of `nbytes` with an unreadable page on either side, at the end or at the start of the room between."""

    def __init__(self, nbytes: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        room = max(page, -(-nbytes // page) * page)
        self.map = mmap.mmap(-1, room + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for fence in (base, base + page + room):
            assert _libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
        self.address = base + page + (room - nbytes if at_end else 0)

    def fill(self, tensor: Tensor) -> None:
        """Copy the tensor in."""
        if tensor.numel():
            ctypes.memmove(self.address, tensor.contiguous().data_ptr(), tensor.nbytes)


@functools.cache
def _unit(kernels: tuple[Kernel, ...]) -> tuple[ctypes.CDLL, tuple[str, ...], tuple[object, ...]]:
    unit = print_unit(kernels)
    library = load(compile_shared(unit.source, cache=Cache(), flags=FLAGS), unit.symbols)
    return library, tuple(f.name for f in unit.functions), unit.functions


def _run_fenced(kernel: Kernel, buffers: dict[str, Tensor], sizes: dict[str, int], at_end: bool) -> None:
    library, names, functions = _unit((kernel,))
    memory = []
    for buffer in kernel.buffers:
        place = Fenced(buffer.nbytes(sizes), at_end)
        if buffer.role != "output":
            place.fill(buffers[buffer.name])
        memory.append(place)
    scratch = max([evaluate(e, sizes) for e in functions[0].scratch], default=0)  # type: ignore[attr-defined]
    room = Fenced(scratch, True)
    for shared in functions[0].shared:  # type: ignore[attr-defined]
        memory.append(Fenced(shared.nbytes(lambda expr: evaluate(expr, sizes), 2), True))
    pointers = (ctypes.c_void_p * len(memory))(*(place.address for place in memory))
    numbers = (ctypes.c_int64 * max(1, len(kernel.sizes)))(*(sizes[s] for s in kernel.sizes))
    error = ctypes.c_int32(0)
    for thread in range(2):
        number = (ctypes.c_int64(thread), ctypes.c_int64(2))
        getattr(library, names[0])(
            pointers, numbers, *number, ctypes.c_void_p(room.address), ctypes.byref(error)
        )


def _survives(kernel: Kernel, buffers: dict[str, Tensor], sizes: dict[str, int]) -> bool:
    _unit((kernel,))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for at_end in (True, False):
                _run_fenced(kernel, buffers, sizes, at_end)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("name", ALL)
def test_hand_written_kernels_stay_inside(name: str) -> None:
    kernel = ALL[name]()
    for sizes in ({"B": 1, "S": 1}, {"B": 2, "S": 7}, {"B": 1, "S": 67}, {"B": 1, "S": 0}):
        assert _survives(kernel, random_buffers(kernel, sizes), sizes), sizes


@pytest.mark.parametrize("name", FORMATS)
def test_stored_formats_stay_inside(name: str) -> None:
    data = quantized(name, 6, 256)
    kernel = stored_matmul(name, 6, 256, data.shape[1])
    for rows in (1, 3, 9):
        assert _survives(kernel, {"x": torch.randn(rows, 256), "w": data}, {"M": rows}), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dense_matmuls_stay_inside(dtype: torch.dtype) -> None:
    for transposed in (False, True):
        kernel = matmul(dtype, 21, 7, transposed)
        shape = (21, 7) if transposed else (7, 21)
        buffers = {"x": torch.randn(5, 21).to(dtype), "w": torch.randn(shape).to(dtype)}
        assert _survives(kernel, buffers, {"M": 5})


def test_the_fence_itself_works() -> None:
    kernel = matmul(torch.float32, 21, 7)
    buffers = {"x": torch.randn(5, 21), "w": torch.randn(7, 21)}
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # this crash is wanted
        place = Fenced(16, True)
        ctypes.string_at(place.address, 17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    assert _survives(kernel, buffers, {"M": 5})
