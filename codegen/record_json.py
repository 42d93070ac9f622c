"""Frozen records as JSON and back, driven by the types of their fields.

Whatever the annotations of a record say is written and, on the way back, demanded: a record gains a field and the
format follows.  Understood are dataclasses, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`, unions, `Literal`, plain
scalars, torch dtypes, index expressions, and tensors by name.  Two tables hold what is shared: `exprs`, the distinct
index expressions, operands first; and `objects`, everything whose identity matters (terms, kernels), likewise.

Nothing here can run code of the file: types come from the annotations, never from the data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import sympy
import torch

from torchweld.codegen.cache import JsonValue
from torchweld.codegen.ir import size_symbol
from torchweld.graph.index import FloorDiv, Mod
from torchweld.graph.terms import Expr, Term, axis_symbol, walk

R = TypeVar("R")

VERSION: Final = 1
"""Of the layout described above; the layout of a record is its class."""
MOST_ENTRIES: Final = 1 << 20
"""Entries of a list or table that are read at most."""

_FUNCTIONS: Final[Mapping[str, type[Any]]] = {
    "+": sympy.Add, "*": sympy.Mul, "**": sympy.Pow, "//": FloorDiv, "%": Mod,
}  # fmt: skip
_SYMBOLS: Final[Mapping[str, Callable[[str], sympy.Symbol]]] = {"axis": axis_symbol, "size": size_symbol}
_DTYPES: Final = {
    str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)
}
_SCALARS: Final = (bool, int, float, str)


class NotStorable(ValueError):
    """A value that has no JSON form here: code, a tensor without a name, a foreign type."""


class DamagedRecord(ValueError):
    """JSON that is not what was written; names the place and what was expected there."""


def record_to_json(
    record: object, kind: Any, shared: Iterable[type] = (), tensor_name: Callable[[torch.Tensor], str] | None = None
) -> JsonValue:  # fmt: skip
    """`record`, a value of type `kind`, as JSON.

    shared: the classes of objects whose identity is kept.  tensor_name: the name of a tensor (it raises NotStorable
    for one that has none).  Raises NotStorable.
    """
    writer = _Writer(tuple(shared), tensor_name)
    value = writer.write(record, kind)
    return {"version": VERSION, "exprs": writer.exprs, "objects": writer.objects, "value": value}


def record_from_json(
    data: JsonValue,
    kind: type[R],
    shared: Iterable[type] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> R:
    """What `record_to_json` was given.  Raises DamagedRecord for anything that it does not write."""
    if not isinstance(data, dict) or set(data) != {"version", "exprs", "objects", "value"}:
        raise DamagedRecord("expected an object of version, exprs, objects and value")
    if data["version"] != VERSION:
        raise DamagedRecord(f"version {data['version']!r}: expected {VERSION}")
    reader = _Reader({cls.__name__: cls for cls in shared}, tensors or {})
    reader.read_exprs(_entries(data["exprs"], "exprs"))
    reader.read_objects(_entries(data["objects"], "objects"))
    try:
        record: R = reader.read(data["value"], kind, kind.__name__)
    except (TypeError, RecursionError) as problem:
        raise DamagedRecord(str(problem)) from problem
    return record


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, Any], ...]:
    """Names and types of the fields of a dataclass, in the order of its constructor."""
    hints = typing.get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


@dataclass(frozen=True)
class _Union:
    """The members of a union: whether None is one, and the others."""

    optional: bool
    members: tuple[Any, ...]

    @property
    def is_tagged(self) -> bool:
        """Whether values carry the name of their class."""
        return len(self.members) > 1 and all(dataclasses.is_dataclass(member) for member in self.members)


@functools.cache
def _union(kind: Any) -> _Union | None:
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return None
    members = typing.get_args(kind)
    return _Union(type(None) in members, tuple(member for member in members if member is not type(None)))


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


class _Writer:
    def __init__(self, shared: tuple[type, ...], tensor_name: Callable[[torch.Tensor], str] | None) -> None:
        self.shared, self.tensor_name = shared, tensor_name
        self.exprs: list[JsonValue] = []
        self.objects: list[JsonValue] = []
        self._expr_numbers: dict[Expr, int] = {}
        self._object_numbers: dict[int, int] = {}
        self._alive: list[object] = []  # an id stands for its object only while that lives

    def write(self, value: Any, kind: Any) -> JsonValue:
        """`value` as an instance of the annotation `kind`."""
        if union := _union(kind):
            return self._member(value, union)
        if kind is Expr:
            return self._expr(value)
        if kind is torch.dtype and isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if kind is torch.Tensor and isinstance(value, torch.Tensor) and self.tensor_name is not None:
            return self.tensor_name(value)
        if isinstance(kind, type) and isinstance(value, kind) and type(value) in self.shared:
            return self._object(value)
        if _is_record(kind) and type(value) is kind:
            return self._record(value)
        if kind in _SCALARS:
            return _write_scalar(value, (kind,))
        return self._container(value, kind)

    def _container(self, value: Any, kind: Any) -> JsonValue:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is Literal and value in args:
            return _write_scalar(value, _SCALARS)
        if origin is tuple and isinstance(value, tuple):
            kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
            return [self.write(part, of) for part, of in zip(value, kinds, strict=True)]
        if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
            return [[_write_scalar(key, (str,)), self.write(part, args[1])] for key, part in value.items()]
        raise NotStorable(f"a {type(value).__name__} as {kind}: no JSON form")

    def _member(self, value: Any, union: _Union) -> JsonValue:
        if value is None and union.optional:
            return None
        if len(union.members) == 1:
            return self.write(value, union.members[0])
        if union.is_tagged and type(value) in union.members:
            return [type(value).__name__, self._record(value)]
        return _write_scalar(value, union.members)

    def _record(self, value: Any) -> list[JsonValue]:
        cls: Any = type(value)  # mypy takes type[object] for unhashable
        return [self.write(getattr(value, name), kind) for name, kind in _fields(cls)]

    def _object(self, value: Any) -> int:
        # A term's operands go first without recursion: chains of terms are deeper than Python's stack.
        for part in walk(value) if isinstance(value, Term) else (value,):
            if id(part) not in self._object_numbers:
                entry: list[JsonValue] = [type(part).__name__, *self._record(part)]
                self._object_numbers[id(part)] = len(self.objects)
                self._alive.append(part)
                self.objects.append(entry)
        return self._object_numbers[id(value)]

    def _expr(self, expr: Expr) -> int:
        if expr not in self._expr_numbers:
            entry = self._expr_entry(expr)
            self._expr_numbers[expr] = len(self.exprs)
            self.exprs.append(entry)
        return self._expr_numbers[expr]

    def _expr_entry(self, expr: Expr) -> JsonValue:
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if isinstance(expr, sympy.Symbol):
            for kind, make in _SYMBOLS.items():
                if make(expr.name) == expr:
                    return [kind, expr.name]
        for name, function in _FUNCTIONS.items():
            if type(expr) is function:
                return [name, *(self._expr(part) for part in expr.args)]
        raise NotStorable(f"index expression {expr}: {type(expr).__name__} has no JSON form")


def _write_scalar(value: Any, kinds: Sequence[Any]) -> JsonValue:
    """A scalar of one of `kinds`; an int may stand for a float, as in Python's typing."""
    allowed = (*kinds, int) if float in kinds else tuple(kinds)
    if type(value) not in _SCALARS or type(value) not in allowed:
        raise NotStorable(f"{value!r} of type {type(value).__name__}: expected {kinds}")
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    plain: JsonValue = value
    return plain


class _Reader:
    def __init__(self, shared: Mapping[str, type], tensors: Mapping[str, torch.Tensor]) -> None:
        self.shared, self.tensors = shared, tensors
        self.exprs: list[Expr] = []
        self.objects: list[object] = []

    def read(self, data: JsonValue, kind: Any, where: str) -> Any:
        """The value of type `kind` that `data` stands for; `where` is its path for messages."""
        if union := _union(kind):
            return self._member(data, union, where)
        if kind is Expr:
            return self.exprs[_number(data, len(self.exprs), where)]
        if kind is torch.dtype:
            return _known(_DTYPES, data, where)
        if kind is torch.Tensor:
            return _known(self.tensors, data, where)
        if isinstance(kind, type) and any(issubclass(cls, kind) for cls in self.shared.values()):
            found = self.objects[_number(data, len(self.objects), where)]
            if not isinstance(found, kind):
                raise DamagedRecord(f"{where}: expected a {kind.__name__}, got a {type(found).__name__}")
            return found
        if _is_record(kind):
            return self._record(data, kind, where)
        if kind in _SCALARS:
            return _read_scalar(data, (kind,), where)
        return self._container(data, kind, where)

    def _container(self, data: JsonValue, kind: Any, where: str) -> Any:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is Literal:
            value = _read_scalar(data, _SCALARS, where)
            if value not in args:
                raise DamagedRecord(f"{where}: {value!r} is none of {args}")
            return value
        entries = _entries(data, where)
        if origin is tuple:
            kinds = (args[0],) * len(entries) if args[-1] is Ellipsis else args
            if len(kinds) != len(entries):
                raise DamagedRecord(f"{where}: expected {len(kinds)} entries, got {len(entries)}")
            return tuple(self.read(part, of, where) for part, of in zip(entries, kinds, strict=True))
        if origin is not None and issubclass(origin, Mapping):
            pairs = [_entries(pair, where, 2) for pair in entries]
            return {_read_scalar(key, (str,), where): self.read(part, args[1], where) for key, part in pairs}
        raise DamagedRecord(f"{where}: {kind} has no JSON form")

    def _member(self, data: JsonValue, union: _Union, where: str) -> Any:
        if data is None and union.optional:
            return None
        if len(union.members) == 1:
            return self.read(data, union.members[0], where)
        if union.is_tagged:
            tag, fields = _entries(data, where, 2)
            return self._record(
                fields, _known({cls.__name__: cls for cls in union.members}, tag, where), where
            )
        return _read_scalar(data, union.members, where)

    def _record(self, data: JsonValue, cls: type, where: str) -> Any:
        fields = _fields(cls)
        entries = _entries(data, where, len(fields))
        values = [
            self.read(e, kind, f"{cls.__name__}.{name}")
            for e, (name, kind) in zip(entries, fields, strict=True)
        ]
        try:
            return cls(*values)
        except ValueError as problem:
            raise DamagedRecord(f"{where}: {problem}") from problem

    def read_objects(self, table: list[JsonValue]) -> None:
        """Make the shared objects; each may only use those before it."""
        for number, entry in enumerate(table):
            name, *fields = _entries(entry, f"object {number}") or [None]
            self.objects.append(
                self._record(fields, _known(self.shared, name, f"object {number}"), f"object {number}")
            )

    def read_exprs(self, table: list[JsonValue]) -> None:
        """Make the expressions exactly as they were: nothing is evaluated or sorted again."""
        for number, entry in enumerate(table):
            where = f"expression {number}"
            if type(entry) is int:
                self.exprs.append(sympy.Integer(entry))
                continue
            name, *operands = _entries(entry, where) or [None]
            if isinstance(name, str) and name in _SYMBOLS:
                symbol = _read_scalar(operands[0] if len(operands) == 1 else None, (str,), where)
                self.exprs.append(_SYMBOLS[name](symbol))
                continue
            function = _known(_FUNCTIONS, name, where)
            parts = [self.exprs[_number(operand, number, where)] for operand in operands]
            if len(parts) < 2 or (name not in ("+", "*") and len(parts) != 2):
                raise DamagedRecord(f"{where}: {name} of {len(parts)} operands")
            self.exprs.append(function(*parts, evaluate=False))


def _entries(data: JsonValue, where: str, length: int | None = None) -> list[JsonValue]:
    """`data` as a list, of `length` entries where that is given."""
    if not isinstance(data, list) or len(data) > MOST_ENTRIES or (length is not None and len(data) != length):
        raise DamagedRecord(f"{where}: expected a list of {'entries' if length is None else length}")
    return data


def _number(data: JsonValue, count: int, where: str) -> int:
    """`data` as an index below `count`."""
    if type(data) is not int or not 0 <= data < count:
        raise DamagedRecord(f"{where}: {data!r} is no index below {count}")
    return data


def _known(table: Mapping[str, R], data: JsonValue, where: str) -> R:
    if not isinstance(data, str) or data not in table:
        raise DamagedRecord(f"{where}: unknown name {data!r}")
    return table[data]


def _read_scalar(data: JsonValue, kinds: Sequence[Any], where: str) -> Any:
    allowed = (*kinds, int) if float in kinds else tuple(kinds)
    if isinstance(data, dict):
        text = data.get("float")
        if len(data) != 1 or text not in ("inf", "-inf", "nan") or float not in kinds:
            raise DamagedRecord(f"{where}: {data!r} is no number")
        return float(str(text))
    if type(data) not in _SCALARS or type(data) not in allowed:
        raise DamagedRecord(f"{where}: {data!r} is none of {', '.join(kind.__name__ for kind in kinds)}")
    return data
