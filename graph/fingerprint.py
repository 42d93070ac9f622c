"""A digest of everything that a captured program follows from, so that an equal digest means an equal program.

What goes in: the source of torchweld itself, the versions of torch and Python and the modes that tracing depends on;
for every submodule its class and plain attributes (numbers, strings, dtypes, tuples, frozen configurations); for every
parameter and buffer its name, dtype, shape, strides and which others it shares memory with; the structure of the
inputs with their dtypes and sizes (the program is symbolic, but the cost model saw these sizes).  What does not: the
values of weights.  Whoever stores something under the digest has to know which values were looked at
(`graph/value_reads.py`).

`fingerprint` gives None, and there is no warm start, where it cannot judge: for classes from anywhere but torch.nn and
torchweld.models, since nobody can tell what foreign code reads in its forward (globals, files, the clock); for hooks,
replaced methods, tensor subclasses, devices other than the CPU, and attributes that are more than plain values.
Functions of torch or torchweld that somebody has replaced at run time are not noticed, but for the methods of
the model's classes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

JUDGED: Final = ("torch.nn.modules.", "torchweld.models.")
"""Where the classes of a model may come from."""
SOURCES: Final = frozenset({".py", ".h", ".cpp", ".j2", ".jinja"})

PACKAGE: Final = Path(__file__).absolute().parents[1]
_IMPORTED: Final = time.time()
_CODE: Final = (str(PACKAGE), str(Path(torch.__file__).absolute().parent))
# What nn.Module itself keeps; parameters, buffers and submodules are judged on their own.
_OWN: Final = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_HOOKS: Final = frozenset(name for name in vars(nn.Module()) if "hook" in name)
_GLOBAL_HOOKS: Final = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Unjudged(Exception):
    """Something whose influence on the program cannot be known; the message names it."""


def fingerprint(
    model: object, args: tuple[object, ...], kwargs: Mapping[str, object], facts: tuple[object, ...] = ()
) -> str | None:
    """64 hex digits for the program of `model(*args, **kwargs)`, or None where it cannot be known.

    facts: whatever else the result depends on (options, ceilings of the machine): plain values or frozen dataclasses.
    """
    try:
        lines = [*_describe_surroundings(), *_describe_model(model), *_describe_inputs(args, kwargs)]
        lines += [_text(fact, "facts") for fact in facts]
    except Unjudged:
        return None
    digest = hashlib.sha256()
    for line in lines:
        data = line.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()


@functools.cache
def package_digest() -> str:
    """The digest of torchweld's own source.  Raises Unjudged if it changed after this process began."""
    return digest_sources(PACKAGE, _IMPORTED)


def digest_sources(root: Path, newest: float = math.inf) -> str:
    """SHA-256 over the paths and contents of all source files below `root`, links followed.

    Raises Unjudged if one was written after `newest`, seconds since 1970: what runs may be older than what lies there.
    """
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for file in (Path(folder, name) for name in sorted(files) if Path(name).suffix in SOURCES):
            if file.stat().st_mtime > newest:
                raise Unjudged(f"{file} is newer than this process")
            content = file.read_bytes()
            digest.update(b"%s:%d:" % (str(file.relative_to(root)).encode(), len(content)) + content)
    return digest.hexdigest()


def _describe_surroundings() -> Iterator[str]:
    yield package_digest()
    yield f"{torch.__version__} {sys.version} {torch.get_default_dtype()} {torch.get_default_device()}"
    yield f"{torch.is_autocast_enabled('cpu')} {torch.get_autocast_dtype('cpu')}"
    yield f"{torch.are_deterministic_algorithms_enabled()}"
    for name in _GLOBAL_HOOKS:
        if getattr(torch.nn.modules.module, name):
            raise Unjudged(f"{name} are set")


def _describe_model(model: object) -> Iterator[str]:
    if not isinstance(model, nn.Module):
        raise Unjudged(f"a {type(model).__name__} is no module")
    numbers: dict[int, int] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in numbers:
            yield f"module {path} is {numbers[id(module)]}"
            continue
        numbers[id(module)] = len(numbers)
        yield f"module {path} {_class_name(type(module))}"
        for name, value in sorted(vars(module).items()):
            if name in _HOOKS:
                if value:
                    raise Unjudged(f"{path}.{name}: hooks")
            elif name not in _OWN:
                yield f"{name}={_text(value, f'{path}.{name}')}"
    yield from _describe_tensors(model)


def _describe_tensors(model: nn.Module) -> Iterator[str]:
    memory: dict[tuple[int, torch.dtype], str] = {}
    kinds = (("parameter", nn.Parameter, model.named_parameters(remove_duplicate=False)),
             ("buffer", Tensor, model.named_buffers(remove_duplicate=False)))  # fmt: skip
    for kind, cls, tensors in kinds:
        for name, tensor in tensors:
            if type(tensor) is not cls:
                raise Unjudged(f"{name} is a {type(tensor).__name__}")
            first = memory.setdefault((tensor.data_ptr(), tensor.dtype), name)
            yield f"{kind} {name} {_tensor_text(tensor, name)} in {first if tensor.numel() else name}"
    # Entries that are None are seen in vars() of no module, but the forward may ask for them.
    for path, module in model.named_modules():
        missing = [n for n, v in (*module._parameters.items(), *module._buffers.items()) if v is None]
        yield f"{path} without {missing}"


def _describe_inputs(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Iterator[str]:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    yield str(spec)
    for number, leaf in enumerate(leaves):
        where = f"input {number}"
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter):
                raise Unjudged(f"{where} is a {type(leaf).__name__}")
            yield _tensor_text(leaf, where)
        else:
            yield _text(leaf, where)


def _tensor_text(tensor: Tensor, where: str) -> str:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise Unjudged(f"{where} is {tensor.layout} on {tensor.device}")
    return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"


@functools.cache
def _is_judged(module: str | None) -> bool:
    return module is not None and f"{module}.".startswith(JUDGED)


def _class_name(cls: type) -> str:
    """The name of a class from a judged place, all of whose methods were written there."""
    for base in cls.__mro__:
        if base in (nn.Module, object):
            break
        if not _is_judged(base.__module__) or not _is_at_home(base):
            raise Unjudged(f"class {base.__module__}.{base.__qualname__}")
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not value.__code__.co_filename.startswith(_CODE):
                raise Unjudged(f"{base.__qualname__}.{name} was replaced")
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_at_home(value: type | types.FunctionType | types.BuiltinFunctionType) -> bool:
    """Whether a class or function is what its module has under its name; one made on the fly is not."""
    found: object = sys.modules.get(value.__module__ or "")
    for step in value.__qualname__.split("."):
        found = getattr(found, step, None)
    return found is value


def _text(value: object, where: str) -> str:
    """A plain value as text: equal texts mean equal values of equal types."""
    if value is None or type(value) in (
        bool,
        int,
        float,
        str,
        bytes,
        complex,
        torch.dtype,
        torch.device,
        torch.Size,
    ):
        return f"{type(value).__name__} {value!r}"
    if type(value) in (tuple, list, set, frozenset):
        assert isinstance(value, (tuple, list, set, frozenset))
        parts = [_text(part, where) for part in value]
        parts = sorted(parts) if isinstance(value, (set, frozenset)) else parts
        return f"{type(value).__name__}({len(parts)}: {', '.join(parts)})"
    if type(value) is dict:
        pairs = (f"{_text(key, where)}: {_text(part, where)}" for key, part in value.items())
        return f"dict({len(value)}: {', '.join(pairs)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _is_frozen(value):
        fields = (f"{f.name}={_text(getattr(value, f.name), where)}" for f in dataclasses.fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) and _is_function_of_torch(value):
        return f"function {value.__module__}.{value.__qualname__}"
    raise Unjudged(f"{where}: a {type(value).__name__}")


def _is_frozen(value: object) -> bool:
    """Whether it is an instance of a frozen dataclass of ours; a foreign one may have properties that compute."""
    cls = type(value)
    parameters = getattr(cls, "__dataclass_params__", None)
    return (
        bool(parameters and parameters.frozen)
        and cls.__module__.startswith("torchweld.")
        and _is_at_home(cls)
    )


def _is_function_of_torch(value: types.FunctionType | types.BuiltinFunctionType) -> bool:
    home = value.__module__ or ""
    return home.partition(".")[0] == "torch" and _is_at_home(value) and not isinstance(value.__name__, type)
