"""`optimize`: a model, a class of models or a function in, the same thing faster out.

model = optimize(model)                       # captured at the first call
model = optimize(model, (ids,))               # captured now
@optimize                                     # on a function of tensors, or on an nn.Module class
@optimize(guide="measure")
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast, overload

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from torchweld.codegen.cache import Cache
from torchweld.graph.capture import capture
from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.program import Program
from torchweld.optimizer.choose_library import choose_library
from torchweld.optimizer.compile import Compiled, Options, compile_program
from torchweld.optimizer.environment import read_environment
from torchweld.optimizer.gate import keep_if_faster
from torchweld.optimizer.pipeline import pass_names
from torchweld.optimizer.profile import kernel_timer
from torchweld.optimizer.report import Report
from torchweld.optimizer.verify import compile_and_compare
from torchweld.optimizer.warm import find_warm_start

MAX_PROGRAMS = 8
MAX_TUNED = 1024  # shapes that are known to be measured
Structure = tuple[object, ...]


class NotOptimizedYet(RuntimeError):
    """The report of a model that has not been called and got no example inputs."""


class Optimized:
    """The optimized forms of one model or function: one program per structure and dtypes of its inputs.

    Sizes do not matter: a program serves every batch and sequence length that its model serves.
    """

    def __init__(
        self, model: Callable[..., Any], options: Options, dynamic: bool | Mapping[str, Any], verify: int
    ) -> None:
        self.model, self.options, self.dynamic, self.verify = model, options, dynamic, verify
        self.programs: dict[Structure, Compiled] = {}
        self._tuned: set[tuple[int, tuple[torch.Size, ...]]] = set()
        self._lock = threading.RLock()

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run without autograd, with the signature of the source."""
        compiled = self.compiled_for(args, kwargs)
        if self.options.tune == "calls":
            with self._lock:
                self._choose(compiled, compiled.program.flatten_inputs(args, kwargs))
        return compiled.run(*args, **kwargs)

    def compiled_for(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Compiled:
        """The program that serves these inputs; made at the first call with inputs of this structure."""
        key = _structure(args, kwargs)
        with self._lock:
            if key not in self.programs:
                if len(self.programs) >= MAX_PROGRAMS:
                    raise CaptureError(
                        what=f"inputs of a {MAX_PROGRAMS + 1}th different structure", place=_name(self.model),
                        expected=f"at most {MAX_PROGRAMS} combinations of argument names, dtypes and ranks",
                        hint="call optimize() once for each way of calling the model",
                    )  # fmt: skip
                self.programs[key] = self._compile(args, kwargs)
            return self.programs[key]

    def _compile(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Compiled:
        # A comparison with float64 needs the captured program, which a warm start does not have.
        level = max(self.verify, read_environment(pass_names()).verify)
        warm = None if level else find_warm_start(self.model, args, kwargs, self.options, self.dynamic)
        if warm is not None and (known := warm.restore()) is not None:
            self._choose(known, known.program.flatten_inputs(args, kwargs))
            return known
        program = capture(self.model, args, kwargs, dynamic=self.dynamic)
        flat = program.flatten_inputs(args, kwargs)
        tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]
        measure = kernel_timer(program, tensors, self.options) if self.options.guide == "measure" else None
        with warm.reads if warm is not None else nullcontext():
            compiled, _ = compile_and_compare(
                program, flat, level=level, options=self.options, name=_name(self.model), measure=measure
            )
        self._choose(compiled, flat)
        keep_if_faster(compiled, program, flat)
        if warm is not None:
            warm.store(compiled)
        return compiled

    def _choose(self, compiled: Compiled, flat: Sequence[object]) -> None:
        """ATen for the products that it computes faster at these sizes."""
        shapes = id(compiled), tuple([leaf.shape for leaf in flat if isinstance(leaf, Tensor)])
        if self.options.tune == "never" or shapes in self._tuned:
            return
        if len(self._tuned) >= MAX_TUNED:
            self._tuned.clear()
        self._tuned.add(shapes)
        choose_library(compiled, flat, self.options.cache or Cache())

    @property
    def compiled(self) -> Compiled:
        """The newest program; NotOptimizedYet before the first call."""
        if not self.programs:
            raise NotOptimizedYet(
                f"{_name(self.model)} has not been captured: call it once, or give optimize() example inputs"
            )
        return list(self.programs.values())[-1]

    @property
    def report(self) -> Report:
        """What was done for the newest program."""
        return self.compiled.report


class OptimizedModule(nn.Module):
    """A model that runs as its optimized programs; its parameters, state_dict and attributes are the source's.

    It holds the source model, and reads its weights where they are: a changed weight needs a new `optimize`.
    """

    def __init__(self, model: nn.Module, optimized: Optimized) -> None:
        super().__init__()
        object.__setattr__(self, "source", model)
        object.__setattr__(self, "optimized", optimized)
        self.training = False

    def forward(self, *args: object, **kwargs: object) -> object:
        """As the source's forward, without autograd."""
        return self.optimized(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the source's (config, generate, ...)."""
        return getattr(self.__dict__["source"], name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The source's state_dict, with its keys."""
        return cast(nn.Module, self.source).state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The source's parameters."""
        return cast(nn.Module, self.source).named_parameters(*args, **kwargs)

    @property
    def report(self) -> Report:
        """What was done."""
        return cast(Optimized, self.optimized).report

    @property
    def compiled(self) -> Compiled:
        """The newest compiled program."""
        return cast(Optimized, self.optimized).compiled


@overload
def optimize(
    model: nn.Module, example_inputs: tuple[object, ...] | None = ..., *,
    example_kwargs: Mapping[str, object] | None = ...,
    dynamic: bool | Mapping[str, Any] = ..., threads: int | None = ..., guide: str = ..., verify: int = ...,
    strict: bool = ..., options: Options | None = ...,
) -> OptimizedModule: ...  # fmt: skip


@overload
def optimize(
    model: None = ..., example_inputs: tuple[object, ...] | None = ..., *,
    example_kwargs: Mapping[str, object] | None = ...,
    dynamic: bool | Mapping[str, Any] = ..., threads: int | None = ..., guide: str = ..., verify: int = ...,
    strict: bool = ..., options: Options | None = ...,
) -> Callable[[Any], Any]: ...  # fmt: skip


@overload
def optimize(
    model: Callable[..., Any], example_inputs: tuple[object, ...] | None = ..., *,
    example_kwargs: Mapping[str, object] | None = ...,
    dynamic: bool | Mapping[str, Any] = ..., threads: int | None = ..., guide: str = ..., verify: int = ...,
    strict: bool = ..., options: Options | None = ...,
) -> Any: ...  # fmt: skip


def optimize(
    model: Any = None, example_inputs: tuple[object, ...] | None = None, *,
    example_kwargs: Mapping[str, object] | None = None, dynamic: bool | Mapping[str, Any] = True,
    threads: int | None = None, guide: str = "model", verify: int = 0, strict: bool = False,
    options: Options | None = None,
) -> Any:  # fmt: skip
    """Optimize a model for inference on this machine's CPU; also a decorator, with and without brackets.

    model: an nn.Module (gives an `OptimizedModule`), an nn.Module class (gives a class whose instances run optimized),
        or a function of tensors (gives such a function).  None: gives a decorator.
    example_inputs, example_kwargs: inputs to capture with; without them the first call's are used.
    dynamic: True makes batch and sequence sizes symbolic; {input name: dimensions} chooses; False fixes all sizes.
    threads: of the executable (default: torch's).  guide: "model" or "measure".
    verify: 1 compares with float64 once and puts the error into the report, 2 does so for every pass as well.
    strict: raise instead of running eagerly where the model cannot be compiled.
    options: everything at once, instead of threads, guide and strict.

    Raises CaptureError (names the user's source line) for a model that cannot be captured; in eager fallback one
    warning says why.  The result computes without autograd.
    """
    chosen = options or Options(threads=threads, guide=guide, strict=strict)

    def apply(target: Any) -> Any:
        if isinstance(target, type) and issubclass(target, nn.Module):
            return _optimized_class(target, chosen, dynamic, verify)
        if not callable(target):
            raise TypeError(
                f"optimize() takes a module, a module class or a function, not {type(target).__name__}"
            )
        optimized = Optimized(target, chosen, dynamic, verify)
        if example_inputs is not None or example_kwargs is not None:
            optimized.compiled_for(tuple(example_inputs or ()), dict(example_kwargs or {}))
        if isinstance(target, nn.Module):
            return OptimizedModule(target, optimized)
        return functools.update_wrapper(_function(optimized), target)

    return apply if model is None else apply(model)


def _function(optimized: Optimized) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        return optimized(*args, **kwargs)

    call.optimized = optimized  # type: ignore[attr-defined]
    return call


def _optimized_class(
    model_class: type[nn.Module], options: Options, dynamic: bool | Mapping[str, Any], verify: int
) -> type[nn.Module]:
    """A subclass whose instances are captured at their first call; `forward` itself stays the user's."""

    class OptimizedClass(model_class):  # type: ignore[misc, valid-type]
        def __call__(self, *args: object, **kwargs: object) -> object:
            if "_torchweld" not in self.__dict__:
                plain = object.__new__(model_class)
                plain.__dict__ = dict(self.__dict__)
                object.__setattr__(self, "_torchweld", Optimized(plain, options, dynamic, verify))
            return self.__dict__["_torchweld"](*args, **kwargs)

        @property
        def report(self) -> Report:
            return cast(Optimized, self.__dict__["_torchweld"]).report

    functools.update_wrapper(OptimizedClass, model_class, updated=())
    return OptimizedClass


def optimize_program(program: Program) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """A function of flat inputs for an already captured program (the torch.compile backend)."""
    compiled = compile_program(program)

    def run(flat: list[Tensor]) -> tuple[Tensor, ...]:
        return compiled(*flat)  # type: ignore[return-value]

    return run


def _structure(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Structure:
    """What a program depends on: the argument tree, dtypes, ranks, devices and plain values."""
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    parts: list[object] = [str(spec)]
    for leaf in leaves:
        parts.append((leaf.dtype, leaf.dim(), str(leaf.device)) if isinstance(leaf, Tensor) else leaf)
    return tuple(parts)


def _name(model: object) -> str:
    return getattr(model, "__name__", None) or type(model).__name__
