"""The seven environment variables: one table, one reader, one error for a bad value.

Read once per `optimize`; nothing else in the project looks at them, but for `TORCHWELD_CACHE_DIR`, which the
kernel cache reads itself (codegen/cache.py), and `TORCHWELD_ISA`, which the search for a compiler does
(codegen/instructions.py). Needs no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torchweld.codegen.instructions import ISA_VARIABLE, PATHS, InstructionsError, check_path
from torchweld.optimizer.suggest import UnknownNameError, nearest

ROOMS: Final = ("graph", "passes", "codegen", "optimizer", "models", "decoding")
VERIFY_LEVELS: Final = (0, 1, 2)


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what values mean, and what it does."""

    name: str
    values: str
    effect: str


LOGS: Final = Variable(
    "TORCHWELD_LOGS", "[+|-]room,...", "log to stderr: + debug, - errors only, else info; or all"
)
DUMP: Final = Variable("TORCHWELD_DUMP", "folder", "write every stage as runnable Python, and every kernel")
VERIFY: Final = Variable(
    "TORCHWELD_VERIFY", "0, 1, 2", "compare with float64: 1 at the end, 2 after every pass"
)
FUEL: Final = Variable("TORCHWELD_FUEL", "n", "stop after n rewrites, to find a guilty one by bisection")
SKIP: Final = Variable("TORCHWELD_SKIP", "pass,pass", "leave out passes, by exact name")
CACHE_DIR: Final = Variable("TORCHWELD_CACHE_DIR", "folder", "where kernels and measurements are kept")
ISA: Final = Variable(
    ISA_VARIABLE, ", ".join(PATHS), "instructions of the kernels; default native: all of this CPU"
)
VARIABLES: Final = (LOGS, DUMP, VERIFY, FUEL, SKIP, CACHE_DIR, ISA)


class SettingError(ValueError):
    """An environment variable whose value means nothing: names the variable, the value and what fits."""


@dataclass(frozen=True)
class LogChoice:
    """Log `name` (dotted, below `torchweld`; "" is everything) from `level` of the logging module upwards."""

    name: str
    level: int

    @property
    def logger(self) -> str:
        """The logger's full name."""
        return f"torchweld.{self.name}" if self.name else "torchweld"


@dataclass(frozen=True)
class Environment:
    """What the seven variables say. `fuel` counts rewrites over all passes; None: no limit."""

    logs: tuple[LogChoice, ...] = ()
    dump: Path | None = None
    verify: int = 0
    fuel: int | None = None
    skip: frozenset[str] = frozenset()
    cache_dir: Path | None = None
    isa: str = "native"


def read_environment(passes: Collection[str], variables: Mapping[str, str] | None = None) -> Environment:
    """Parse the seven variables (of `os.environ` unless given); an empty value counts as not set.

    passes: the exact pass names that TORCHWELD_SKIP and TORCHWELD_LOGS may use. Raises SettingError and
    UnknownNameError; also for a variable that begins with TORCHWELD_ and is none of the seven, because nobody
    would ever see that typing error.
    """
    given = os.environ if variables is None else variables
    _check_names(given)
    values = {variable.name: given.get(variable.name, "").strip() for variable in VARIABLES}
    return Environment(
        logs=parse_logs(values[LOGS.name], passes),
        dump=_folder(DUMP, values[DUMP.name]),
        verify=_verify(values[VERIFY.name]),
        fuel=_count(FUEL, values[FUEL.name]),
        skip=_skip(values[SKIP.name], passes),
        cache_dir=_folder(CACHE_DIR, values[CACHE_DIR.name]),
        isa=_isa(values[ISA.name]),
    )


def parse_logs(text: str, passes: Collection[str] = ()) -> tuple[LogChoice, ...]:
    """Parse the grammar of TORCH_LOGS: `[+|-]name`, comma-separated; + is DEBUG, - is ERROR, neither is INFO.

    A name is `all`, a room, a pass, or a dotted module below a room, with or without `torchweld.` before it.
    Raises UnknownNameError naming the nearest room or pass.
    """
    choices = []
    for item in _items(text):
        level = {"+": logging.DEBUG, "-": logging.ERROR}.get(item[0], logging.INFO)
        name = item.lstrip("+-").removeprefix("torchweld.")
        if name in passes:
            name = f"passes.{name}"
        if name not in ("all", "torchweld") and name.partition(".")[0] not in ROOMS:
            raise UnknownNameError("log", name, (*ROOMS, "all", *passes), LOGS.name)
        choices.append(LogChoice("" if name in ("all", "torchweld") else name, level))
    return tuple(choices)


def apply_logs(choices: Collection[LogChoice]) -> None:
    """Set the levels of our loggers; the first time, send them to stderr. Does nothing without choices."""
    if not choices:
        return
    root = logging.getLogger("torchweld")
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    for choice in choices:
        logging.getLogger(choice.logger).setLevel(choice.level)


def _check_names(given: Mapping[str, str]) -> None:
    known = [variable.name for variable in VARIABLES]
    for name in given:
        if name.startswith("TORCHWELD_") and name not in known:
            raise SettingError(f"{name} is no variable of torchweld; the nearest is {nearest(name, known)}")


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _folder(variable: Variable, text: str) -> Path | None:
    if not text:
        return None
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{variable.name}={text}: is a file; expected a folder")
    return folder


def _count(variable: Variable, text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise SettingError(f"{variable.name}={text}: expected a whole number from 0 up ({variable.effect})")
    return int(text)


def _isa(text: str) -> str:
    try:
        return check_path(text or "native")
    except InstructionsError as error:
        raise SettingError(str(error)) from error


def _verify(text: str) -> int:
    level = _count(VERIFY, text) or 0
    if level not in VERIFY_LEVELS:
        raise SettingError(f"{VERIFY.name}={text}: expected {VERIFY.values} ({VERIFY.effect})")
    return level


def _skip(text: str, passes: Collection[str]) -> frozenset[str]:
    names = _items(text)
    for name in names:
        if name not in passes:
            raise UnknownNameError("pass", name, passes, SKIP.name)
    return frozenset(names)
