"""What a command works on: a loaded model, inputs of the wanted size, and their compiled program."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from torch import Tensor

from torchweld.codegen.cpp_packed import PRECISIONS, Precision
from torchweld.graph.capture import capture
from torchweld.graph.capture_inputs import Family, flatten_example
from torchweld.graph.program import Program
from torchweld.models.errors import ModelFileError
from torchweld.models.load import LoadedModel, load_model
from torchweld.optimizer.api import optimize
from torchweld.optimizer.compile import Compiled, Options
from torchweld.optimizer.environment import read_environment
from torchweld.optimizer.gate import keep_if_faster
from torchweld.optimizer.ledger import Phase
from torchweld.optimizer.pipeline import pass_names
from torchweld.optimizer.profile import kernel_timer, profile
from torchweld.optimizer.progress import show_phase
from torchweld.optimizer.report import Report
from torchweld.optimizer.suggest import check_name
from torchweld.optimizer.verify import StageCheck, compile_and_compare

DEFAULT_BATCH = 1
DEFAULT_SEQUENCE = 64


@dataclass(frozen=True)
class Wish:
    """Options that commands have in common; None leaves the choice to us. `verify` as TORCHWELD_VERIFY."""

    batch: int | None = None
    sequence: int | None = None
    threads: int | None = None
    guide: str = "model"
    verify: int = 0
    strict: bool = False
    profile: bool = False
    precision: Precision = "f32"

    def options(self) -> Options:
        """What of it concerns the compiler."""
        return Options(threads=self.threads, guide=self.guide, strict=self.strict, precision=self.precision)


def check_precision(name: str) -> Precision:
    """What --precision names; UnknownNameError for what is none."""
    check_name("precision", name, PRECISIONS, "--precision")
    return name  # type: ignore[return-value]


@dataclass
class Subject:
    """A model, positional inputs for it, and the seconds that each step with them took."""

    loaded: LoadedModel
    inputs: tuple[Tensor, ...]
    phases: list[Phase] = field(default_factory=list)
    is_busy: bool = False

    @property
    def sizes(self) -> str:
        """Shapes of the inputs, such as `1x64`."""
        return ", ".join("x".join(str(size) for size in tensor.shape) or "number" for tensor in self.inputs)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a step on stderr while it runs, and keep its time. A step inside of another one is not shown."""
        start = time.perf_counter()
        inside, self.is_busy = self.is_busy, True
        try:
            with nullcontext() if inside else show_phase(name, self.loaded.name):
                yield
        finally:
            self.is_busy = inside
        self.phases.append(Phase(name, time.perf_counter() - start))


@dataclass(frozen=True)
class Job:
    """A subject and what was compiled from it; no `verdict`: it was not compared with float64."""

    subject: Subject
    compiled: Compiled
    verdict: StageCheck | None = None

    @property
    def report(self) -> Report:
        """The compiler's report under the model's name, with the seconds of loading and capture in front."""
        known = self.compiled.report
        front = tuple(phase for phase in self.subject.phases if phase.name in ("load", "capture"))
        names = size_names(self.compiled)
        sizes = tuple((names.get(symbol, symbol), size) for symbol, size in known.sizes)
        return replace(
            known, model=self.subject.loaded.name, sizes=tuple(sorted(sizes)), phases=(*front, *known.phases)
        )

    def __call__(self, *inputs: Tensor) -> object:
        """Run the compiled program with the model's signature."""
        return self.compiled.run(*inputs)


def load_subject(spec: str, wish: Wish) -> Subject:
    """Load MODEL and bring its example inputs to the wanted batch size and sequence length.

    Without a wish, language models get 1 x 64 and others keep the example inputs that they came with. Raises
    ModelFileError; also for a factory that gives no example inputs.
    """
    start = time.perf_counter()
    with show_phase("load", spec):
        loaded = load_model(spec)
    if not loaded.example_inputs:
        hint = "return (module, (tensor, ...)) from the factory"
        raise ModelFileError(spec, "gives no example inputs", "at least one tensor", hint)
    check_device(loaded, spec)
    batch, sequence = wish.batch, wish.sequence
    if loaded.kind in ("decoder", "encoder"):
        batch, sequence = batch or DEFAULT_BATCH, sequence or DEFAULT_SEQUENCE
    inputs = resize_inputs(loaded, batch, sequence)
    return Subject(loaded, inputs, [Phase("load", time.perf_counter() - start)])


def check_device(loaded: LoadedModel, spec: str) -> None:
    """ModelFileError for a model or inputs on another device than the CPU, which our executables run on."""
    tensors = (*loaded.module.parameters(), *loaded.module.buffers(), *loaded.example_inputs)
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        raise ModelFileError(
            spec, f"has tensors on the device {str(device)!r}", "cpu", "move them to the cpu"
        )


def resize_inputs(loaded: LoadedModel, batch: int | None, sequence: int | None) -> tuple[Tensor, ...]:
    """Example inputs with every batch and sequence dimension at the wanted size; their contents repeat."""
    example = flatten_example(loaded.module, loaded.example_inputs, {}, True)
    wanted = {"batch": batch, "sequence": sequence}
    sizes: dict[Family, int] = {}
    for axis in example.axes:
        size = wanted.get(axis.role)
        if size is not None:
            sizes[axis.family] = size
    return tuple(leaf for leaf in example.resized(sizes) if isinstance(leaf, Tensor))


def size_names(compiled: Compiled) -> dict[str, str]:
    """What each size symbol of the inputs means: "batch", "sequence", or `input[dim]` for any other."""
    names: dict[str, str] = {}
    for spec in compiled.built.plan.inputs if compiled.built is not None else ():
        for dim, extent in enumerate(spec.shape):
            role = ("batch", "sequence")[dim] if dim < 2 else ""
            name = role if role and role not in names.values() else f"{spec.name}[{dim}]"
            names.setdefault(str(extent), name)
    return names


def capture_subject(subject: Subject) -> Program:
    """The captured program; what may vary in size is symbolic."""
    with subject.phase("capture"):
        return capture(subject.loaded.module, subject.inputs)


def compile_subject(subject: Subject, wish: Wish) -> Job:
    """Compile for inputs like the subject's, as `optimize` does it: from the cache where it knows the model.

    A wish to compare or to time needs the captured program, and `explain_subject` makes it.
    """
    if wish.verify or wish.profile or read_environment(pass_names()).verify:
        return explain_subject(subject, wish)
    with subject.phase("optimize"):
        optimized = optimize(subject.loaded.module, subject.inputs, options=wish.options())
    return Job(subject, optimized.compiled)


def explain_subject(subject: Subject, wish: Wish, *, gate: bool = True) -> Job:
    """Capture and compile afresh, with everything known about it; compare and time if the wish says so.

    gate: run eagerly what is slower compiled, as `optimize` does.
    """
    environment = read_environment(pass_names())
    program = capture_subject(subject)
    flat = program.flatten_inputs(subject.inputs, {})
    options = wish.options()
    measure = kernel_timer(program, subject.inputs, options) if wish.guide == "measure" else None
    level = max(wish.verify, environment.verify)
    with subject.phase("compile and compare with float64" if level else "compile"):
        compiled, verdict = compile_and_compare(program, flat, level=level, options=options, measure=measure)
    if gate:
        with subject.phase("compare with eager"):
            keep_if_faster(compiled, program, flat)
    if wish.profile:
        with subject.phase("time kernels of"):
            profile(compiled)
    return Job(subject, compiled, verdict)
