"""What torchweld finds on this machine: versions, compiler, CPU, measured ceilings, cache folder, variables.

`examine` only looks and measures, `Diagnosis` renders. A thing that is missing is a finding, never an error:
this is the command that people run when something does not work. Needs no torch beyond its version.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Final

from rich.console import Console

from torchweld.codegen.cache import Cache
from torchweld.codegen.instructions import chosen_path, cpu_features
from torchweld.codegen.probe import describe_machine, measured_target
from torchweld.codegen.toolchain import Compiler, ToolchainError, find_compiler
from torchweld.graph.target import Target
from torchweld.optimizer.environment import VARIABLES, read_environment
from torchweld.optimizer.report_tables import Column, Table

_PACKAGES: Final = (
    "torchweld",
    "torch",
    "triton",
    "numpy",
    "gguf",
    "safetensors",
    "tokenizers",
    "transformers",
)
# The features that kernels use or that explain their speed; a CPU lists a hundred more.
_FEATURES: Final = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class CacheState:
    """The kernel cache: folder in use, what it holds, and why the wished folder is not used (None: it is)."""

    folder: str
    entries: int
    bytes: int
    refused: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Findings; `problems` are the lines that a user should act on.

    versions: (package, version or None if absent). compiler: command and its own version line, None without
    one. variables: (name, value or None, values, effect).
    """

    system: str
    cpu: str
    versions: tuple[tuple[str, str | None], ...]
    compiler: tuple[str, str] | None
    features: tuple[str, ...]
    instructions: str
    target: Target
    cache: CacheState
    variables: tuple[tuple[str, str | None, str, str], ...]
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """Indented JSON of the fields."""
        return json.dumps(asdict(self), indent=2)

    def tables(self) -> tuple[Table, ...]:
        """What `render` prints, table by table."""
        return self._machine(), _ceilings(self.target), self._versions(), self._variables()

    def render(self, console: Console) -> None:
        """Print to a terminal of at least 100 columns."""
        for table in self.tables():
            console.print(table.to_rich())
            console.print()
        for problem in self.problems:
            console.print(f"! {problem}", markup=False, highlight=False, soft_wrap=True)

    def _machine(self) -> Table:
        compiler = " ".join(self.compiler) if self.compiler else "none: graphs run eagerly"
        cache = f"{self.cache.entries} entries, {self.cache.bytes / 1e6:.1f} MB"
        rows = (
            ("system", self.system),
            ("cpu", self.cpu),
            ("features", " ".join(self.features) or "none known"),
            ("instructions", self.instructions),
            ("compiler", compiler),
            ("cache", f"{self.cache.folder} ({cache})"),
        )
        return Table("Machine", (Column("", "left"), Column("", "left", wide=True)), rows)

    def _versions(self) -> Table:
        rows = tuple((name, version or "not installed") for name, version in self.versions)
        return Table("Versions", (Column("package", "left"), Column("version", "left")), rows)

    def _variables(self) -> Table:
        columns = tuple(Column(name, "left", wide=name in ("value", "effect")) for name in _VARIABLE_HEADINGS)
        rows = tuple(
            (name, value or "(not set)", values, effect) for name, value, values, effect in self.variables
        )
        return Table("Variables", columns, rows)


_VARIABLE_HEADINGS: Final = ("variable", "value", "takes", "effect")


def examine(passes: Collection[str], variables: Mapping[str, str] | None = None) -> Diagnosis:
    """Look at this machine; measures its ceilings if the cache does not have them (about 1 s).

    passes: the valid names for TORCHWELD_SKIP. variables: the environment, `os.environ` unless given.
    """
    given = os.environ if variables is None else variables
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiler, missing = _find_compiler()
        cache = Cache()
        target = measured_target(cache)
        stats = cache.stats()
    problems = [str(warning.message) for warning in caught]
    if missing is not None:
        problems.append(missing)
    try:
        read_environment(passes, given)
    except ValueError as error:
        problems.append(str(error))
    machine = describe_machine()
    known = cpu_features()
    return Diagnosis(
        system=f"{platform.platform(terse=True)} {platform.machine()}, Python {platform.python_version()}",
        cpu=machine.name,
        versions=tuple((package, _version(package)) for package in _PACKAGES),
        compiler=(" ".join(compiler.command), compiler.version) if compiler else None,
        features=tuple(feature for feature in _FEATURES if feature in known),
        instructions=_instructions(compiler),
        target=target,
        cache=CacheState(str(stats.folder), stats.entries, stats.bytes, stats.refused),
        variables=tuple((v.name, given.get(v.name), v.values, v.effect) for v in VARIABLES),
        problems=tuple(problems),
    )


def _instructions(compiler: Compiler | None) -> str:
    """The path in use, and the flags that ask for it."""
    if compiler is None:
        return "none: there is no compiler"
    return f"{chosen_path()} ({' '.join(compiler.target_flags)})"


def _find_compiler() -> tuple[Compiler | None, str | None]:
    """The compiler, or why there is none."""
    try:
        compiler = find_compiler()
    except ToolchainError as error:
        return None, str(error)
    if compiler is None:
        return None, "no C++ compiler: install g++ or clang++, set CXX, or `pip install torchweld[zig]`"
    return compiler, None


def _ceilings(target: Target) -> Table:
    """The numbers of the roofline."""
    rows = (
        ("memory read", f"{target.read_gb_s:.1f}", "GB/s"),
        ("f32 arithmetic", f"{target.f32_gflops:.0f}", "GFLOP/s"),
        ("bf16 arithmetic", f"{target.bf16_gflops:.0f}", "GFLOP/s"),
        ("int8 arithmetic", f"{target.int8_gops:.0f}", "GOP/s"),
        ("launch", f"{target.launch_us:.2f}", "us"),
        ("level 2 cache", f"{target.l2_bytes / 1024:.0f}", "KiB per core"),
        ("level 3 cache", f"{target.l3_bytes / 1024:.0f}", "KiB"),
    )
    columns = (Column("ceiling", "left"), Column(target.origin), Column("unit", "left"))
    return Table(f"Ceilings ({target.cores} cores together)", columns, rows)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
