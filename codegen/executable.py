"""The CPU executable: one shared object, one memory plan per set of sizes, one call per run of launches.

A call checks its inputs, binds the sizes (binding.py), places intermediate values in an arena and runs the steps.
Everything that depends on the shapes only is kept for the last few sets of shapes.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import is_
from typing import Any, Final

import torch
from torch import Tensor

from torchweld.codegen.binding import Binder, Binding, PreparedLaunch
from torchweld.codegen.cache import Cache
from torchweld.codegen.cpp import FLAGS, PrintedUnit, print_unit
from torchweld.codegen.cpp_names import PrintError
from torchweld.codegen.cpp_packed import FEW_ROWS, Precision
from torchweld.codegen.ir import Kernel
from torchweld.codegen.library_runs import LibraryLaunch, LibraryRuns
from torchweld.codegen.narrow_plan import narrowed
from torchweld.codegen.packed_plan import PackedConstants
from torchweld.codegen.plan import EagerStep, Launch, Plan, PlanError, SizeTable, Work, work
from torchweld.codegen.plan_inputs import InputChecks, bind_sizes, input_slots, number_slots, shape_of
from torchweld.codegen.plan_memory import MemoryPlan
from torchweld.codegen.prepared_call import PreparedCall, prepare_outputs
from torchweld.codegen.runtime.team import MOST_ARGUMENTS, LaunchRecord, Team, shared_team
from torchweld.codegen.toolchain import ToolchainError, compile_shared, load

_BINDINGS_KEPT: Final = 16


class BuildError(RuntimeError):
    """The plan cannot be compiled here (no compiler, a construct without C++); the caller runs the graph eagerly."""


@dataclass(frozen=True)
class ExecutableStats:
    """Counters since the executable was made, and the memory plan of the last call (bytes)."""

    calls: int
    launches: int
    eager_steps: int
    functions: int
    bindings: int
    arena_bytes: int
    unshared_bytes: int
    scratch_bytes: int
    source_bytes: int


class Executable:
    """A plan, compiled. Call it with the plan's inputs to get its outputs.

    threads: None means `torch.get_num_threads()`. cache: where compiled units are kept; None means the user's cache.
    precision: of products with packed weights (codegen/cpp_packed.py has the table). packed_cache: keep these there.
    Raises BuildError if it cannot be compiled, PlanError if the plan contradicts itself. Several threads may call one
    executable; they take turns. The bits of the result do not depend on `threads`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        threads: int | None = None,
        cache: Cache | None = None,
        precision: Precision = "f32",
        packed_cache: bool = False,
    ) -> None:
        plan.check()
        self.precision: Precision = precision
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads() if threads is None else threads
        self._cache = cache or Cache()
        try:
            self._packed = PackedConstants(plan, self._threads, self._cache, precision, keep=packed_cache)
        except ToolchainError as error:
            raise BuildError(f"the weights cannot be packed: {error}") from error
        self.plan = plan = narrowed(plan, self._packed.formats, precision)
        self._launches = plan.launches()
        kept = {name: tensor for name, tensor in plan.constants.items() if name not in self._packed.data}
        self._constants = {
            name: tensor.detach().contiguous() for name, tensor in kept.items()
        } | self._packed.data
        self._slots = number_slots(plan)
        self.library = LibraryRuns(plan, precision)
        self._input_names = [spec.name for spec in plan.inputs]
        self._checks = InputChecks(plan)
        self._input_slots = input_slots(plan, self._slots)
        self._has_eager_steps = any(isinstance(step, EagerStep) for step in plan.steps)
        self._torch_takes_part = self._has_eager_steps
        places = {name: number for number, name in enumerate(self._input_names)}
        sources = [plan.in_place.get(name, name) for name in plan.outputs]
        self._outputs = [
            (name, None if source in self._constants else places.get(source))
            for name, source in zip(plan.outputs, sources, strict=True)
        ]
        self._unit, self._team, self._functions = self._build()
        shared = max((len(function.shared) for function in self._unit.functions), default=0)
        self._shared = [torch.zeros(0, dtype=torch.uint8) for _ in range(shared)]
        self._prepared = self._prepare()
        self._pointers = (ctypes.c_void_p * max(1, len(self._slots) + shared))()
        for name, tensor in self._constants.items():
            self._pointers[self._slots[name]] = tensor.data_ptr()
        few = 0 if precision == "f32" else FEW_ROWS
        self._binder = Binder(
            plan, self._slots, shared, self._unit.functions, self._prepared, self.library, self._threads, few
        )
        self._bindings: OrderedDict[tuple[tuple[int, ...], ...], Binding] = OrderedDict()
        self._arena = self._scratch = torch.empty(0, dtype=torch.uint8)
        self._placed: Binding | None = None
        self._pointed_at: PreparedCall | None = None
        self._calls = 0
        _executables.add(self)

    # -- building ---------------------------------------------------------------------------------------------------

    def _build(self) -> tuple[PrintedUnit, Team | None, tuple[int, ...]]:
        if not self._launches:
            return PrintedUnit("", ()), None, ()
        for launch in self._launches:
            if len(launch.arguments) > MOST_ARGUMENTS:
                count = len(launch.arguments)
                raise BuildError(f"kernel {launch.kernel.name}: {count} buffers; at most {MOST_ARGUMENTS}")
        try:
            unit = print_unit(self._packed.kernels(self._launches), self.precision)
            parts = unit.parts(len(os.sched_getaffinity(0)))
            path = compile_shared(unit.source, cache=self._cache, flags=FLAGS, name="unit", parts=parts)
            library = load(path, unit.symbols)
            team = shared_team(self._threads, self._cache)
        except (PrintError, ToolchainError) as error:
            raise BuildError(f"the graph cannot be compiled: {error}") from error
        address = {s: ctypes.cast(getattr(library, s), ctypes.c_void_p).value or 0 for s in unit.symbols}
        return unit, team, tuple(address[function.name] for function in unit.functions)

    def _prepare(self) -> tuple[PreparedLaunch, ...]:
        """Of every launch what does not depend on sizes; a kernel that many launches share is looked at once."""
        works: dict[int, tuple[Work, ...]] = {}
        prepared = []
        for launch, function, address in zip(
            self._launches, self._unit.functions, self._functions, strict=True
        ):
            places = [self._slots[name] for name in launch.arguments]
            places += [len(self._slots) + number for number in range(len(function.shared))]
            slots = (ctypes.c_int32 * max(1, len(places)))(*places)
            works.setdefault(id(launch.kernel), work(launch.kernel))
            prepared.append(
                PreparedLaunch(launch.kernel, address, slots, len(places), works[id(launch.kernel)])
            )
        return tuple(prepared)

    @property
    def threads(self) -> int:
        """Threads that share the work of a launch."""
        return self._threads

    @property
    def source(self) -> str:
        """The C++ of the unit."""
        return self._unit.source

    def stats(self) -> ExecutableStats:
        """Counters and sizes for reports."""
        memory = self._placed.memory if self._placed else MemoryPlan({}, 0, 0)
        arena_bytes = self._placed.arena_bytes if self._placed else 0
        eager = len(self.plan.steps) - len(self._launches)
        return ExecutableStats(
            self._calls, len(self._launches), eager, len(self._unit.symbols), len(self._bindings), arena_bytes,
            memory.total_bytes, self._scratch.numel(), len(self._unit.source),
        )  # fmt: skip

    # -- calling ----------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The plan's outputs, new tensors (an output that is an input, or an input updated in place, is that input).

        Raises TypeError for a wrong number, dtype or device of inputs, ShapeError (a ValueError) for a wrong shape,
        ValueError for an updated input that is not contiguous or given twice, IndexError naming the kernel where an
        index is outside its table.
        """
        with self._lock:
            self._calls += 1
            tensors, moved = self._checks(inputs)
            self._point_at(tensors, self._checks.updated if moved else ())
            values = self._seen_by_torch(tensors) if self._torch_takes_part else {}
            self._renew_packed()
            binding = self._binding(inputs)
            self._place(binding)
            self._allocate_fresh(binding, values)
            self._run(binding, values)
            return tuple(
                [inputs[at] if at is not None else self._output(name, values) for name, at in self._outputs]
            )

    def prepare(self, *inputs: Tensor) -> PreparedCall | None:
        """The call with these inputs, whose shapes and memory will not change, to be made often; None where torch takes
        part in it, or an input would be copied. Raises as a call does."""
        with self._lock:
            tensors, _ = self._checks(inputs)
            self._checks.forget()
            copied = not all(map(is_, tensors, inputs))
            constant = any(at is None and name in self._constants for name, at in self._outputs)
            if self._torch_takes_part or copied or constant:
                return None
            binding = self._binding(inputs)
            results, fresh, places = prepare_outputs(
                self._binder.fresh, binding.fresh_shapes, self._outputs, inputs, self._slots
            )
            for slots, tensor in zip(self._input_slots, inputs, strict=True):
                places += [(slot, tensor.data_ptr()) for slot in slots]
            return PreparedCall(self._run_prepared, inputs, tuple(places), binding, results, fresh)

    def _run_prepared(self, call: PreparedCall) -> tuple[Tensor, ...]:
        """The results of a prepared call."""
        if self._torch_takes_part:  # since it was prepared
            return self(*call.inputs)
        with self._lock:
            self._calls += 1
            pointers = self._pointers
            if self._pointed_at is not call or self._placed is not call.binding:
                self._checks.forget()
                for slot, address in call.places:
                    pointers[slot] = address
                self._place(call.binding)
                self._pointed_at = call
            self._renew_packed()
            results: list[Any] = list(call.results)
            for fresh in call.fresh:
                tensor = torch.empty(fresh.shape, dtype=fresh.dtype)
                pointers[fresh.slot] = tensor.data_ptr()
                for number in fresh.numbers:
                    results[number] = tensor
            self._run(call.binding, {})
            return tuple(results)

    def _point_at(self, tensors: Sequence[Tensor], updated: Sequence[int]) -> None:
        """Tell the launches where the inputs are; of those that are updated, these have moved."""
        self._pointed_at = None
        for number in (*self._checks.read_only, *updated):
            for slot in self._input_slots[number]:
                self._pointers[slot] = tensors[number].data_ptr()

    def _seen_by_torch(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs by name, for steps that torch runs: launches find them by their places."""
        values = dict(zip(self._input_names, tensors, strict=True))
        return values | {name: values[source] for name, source in self.plan.in_place.items()}

    def packed_kernel(self, launch: Launch, kernel: Kernel) -> Kernel:
        """`kernel`, which is that of `launch` but for names, as it reads the packed weights."""
        return self._packed.kernels([Launch(kernel, launch.arguments)])[0]

    def release_stored(self) -> int:
        """Drop what is in memory of the model's file and is read no longer, its weights being packed; bytes."""
        return self._packed.release_stored()

    def use_library(self, chosen: Mapping[str, Collection[int]]) -> None:
        """Run these kernels through ATen for rows of these buckets (codegen/library_runs.py), and no others."""
        with self._lock:
            self.library.choose(chosen)
            self._torch_takes_part = self._has_eager_steps or bool(chosen)
            self._bindings.clear()
            self._placed = None

    def sizes_of(self, inputs: Sequence[Tensor]) -> SizeTable:
        """The sizes that the plan's inputs have. Raises ShapeError."""
        return SizeTable(bind_sizes(self.plan, [tuple(tensor.shape) for tensor in inputs]))

    def single_runs(
        self, kernel: str, inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """For measuring: run the first launch of `kernel` at the sizes of `inputs`, by itself and through ATen.

        What it reads of other launches is random data. Calls of the executable in between make both meaningless.
        """
        tensors, _ = self._checks(inputs)
        self._point_at(tensors, self._checks.updated)
        values = self._seen_by_torch(tensors)
        binding = self._binder.bind(self.sizes_of(inputs), in_pieces=False)
        self._place(binding)
        self._allocate_fresh(binding, values)
        number = next(n for n, launch in enumerate(self._launches) if launch.kernel.name == kernel)
        launch, prepared = self._launches[number], self._prepared[number]
        for name in launch.read():
            if name in self.plan.values:
                self._tensor(name, binding, values).uniform_(-1, 1)
        names = launch.kernel.sizes
        sizes = (ctypes.c_int64 * max(1, len(names)))(*(binding.table.sizes[name] for name in names))
        records = (LaunchRecord * 1)()
        prepared.fill(records[0], sizes, self._threads == 1)
        table, scratch = ctypes.addressof(self._pointers), self._scratch.data_ptr()
        team, library = self._team, self.library.prepare(launch, binding.table)
        assert team is not None

        def ours() -> None:
            assert len(sizes) and values is not None  # the record and the table point to them
            team.run(records, table, scratch, binding.scratch_stride)

        return ours, lambda: self._run_library(library, binding, values)

    def _renew_packed(self) -> None:
        """Pack again what was written to since it was packed."""
        for name, data in self._packed.renewed().items():
            self._constants[name] = data
            self._pointers[self._slots[name]] = data.data_ptr()

    def _output(self, name: str, values: dict[str, Tensor]) -> Tensor:
        # The caller may write into it.
        return self._constants[name].clone() if name in self._constants else values[name]

    def _run(self, binding: Binding, values: dict[str, Tensor]) -> None:
        for segment, launches in zip(binding.segments, binding.launches, strict=True):
            if isinstance(segment, EagerStep):
                self._run_eagerly(segment, binding, values)
                continue
            if isinstance(segment, LibraryLaunch):
                self._run_library(segment, binding, values)
                continue
            assert self._team is not None
            table, scratch = ctypes.addressof(self._pointers), self._scratch.data_ptr()
            pieces = binding.pieces.record if binding.pieces else None
            failed = self._team.run(segment, table, scratch, binding.scratch_stride, pieces)
            if failed >= 0:
                raise IndexError(_index_message(launches[failed]))

    def _run_eagerly(self, step: EagerStep, binding: Binding, values: dict[str, Tensor]) -> None:
        sizes = binding.table.sizes
        arguments = [
            sizes[name] if name in sizes else values[name] if name in values else self._constants[name]
            for name in step.arguments
        ]
        with torch.no_grad():
            results = step.module(*arguments)
        results = results if isinstance(results, tuple | list) else (results,)
        if len(results) != len(step.results):
            raise PlanError(
                f"eager step ({step.reason}): {len(step.results)} results expected, got {len(results)}"
            )
        for name, result in zip(step.results, results, strict=True):
            values[name] = result
            if name in self._slots and isinstance(result, Tensor):
                values[name] = result = result.contiguous()
                self._pointers[self._slots[name]] = result.data_ptr()

    def _run_library(self, step: LibraryLaunch, binding: Binding, values: dict[str, Tensor]) -> None:
        inputs = [self._tensor(name, binding, values) for name in step.launch.read()]
        places = [self._tensor(name, binding, values) for name in step.launch.written()]
        self.library.run(step, inputs, places)

    def _tensor(self, name: str, binding: Binding, values: dict[str, Tensor]) -> Tensor:
        """A value as a tensor: of the caller or for it, a constant as the model has it, or a place in the arena."""
        if name in values:
            return values[name]
        if name in self.plan.constants:
            return self.plan.constants[name].detach()
        spec = self.plan.values[name]
        start, shape = binding.memory.offsets[name], binding.table.shape(spec)
        return self._arena[start : start + prod(shape) * spec.dtype.itemsize].view(spec.dtype).view(shape)

    def _allocate_fresh(self, binding: Binding, values: dict[str, Tensor]) -> None:
        for spec, shape in zip(self._binder.fresh, binding.fresh_shapes, strict=True):
            values[spec.name] = tensor = torch.empty(shape, dtype=spec.dtype)
            self._pointers[self._slots[spec.name]] = tensor.data_ptr()

    # -- what follows from the shapes ---------------------------------------------------------------------------------

    def _binding(self, inputs: Sequence[Tensor]) -> Binding:
        key = tuple(map(shape_of, inputs))
        known = self._bindings.get(key)
        if known is not None:
            if known is not self._placed:  # what was used last stands at the end
                self._bindings.move_to_end(key)
            return known
        table = SizeTable(bind_sizes(self.plan, key))
        binding = self._binder.bind(table)
        self._bindings[key] = binding
        if len(self._bindings) > _BINDINGS_KEPT:
            self._bindings.popitem(last=False)
        return binding

    def _place(self, binding: Binding) -> None:
        """Point the values of the arena to their places for this binding."""
        if self._placed is binding:
            return
        if self._arena.numel() < binding.arena_bytes:
            self._arena = torch.empty(binding.arena_bytes, dtype=torch.uint8)
        if self._scratch.numel() < self._threads * binding.scratch_stride:
            self._scratch = torch.empty(self._threads * binding.scratch_stride, dtype=torch.uint8)
        for number, nbytes in enumerate(binding.shared_bytes):
            if self._shared[number].numel() < nbytes:
                self._shared[number] = torch.zeros(nbytes, dtype=torch.uint8)
            self._pointers[len(self._slots) + number] = self._shared[number].data_ptr()
        base = self._arena.data_ptr()
        for name, offset in binding.memory.offsets.items():
            self._pointers[self._slots[name]] = base + offset
        self._placed = binding

    def after_fork(self) -> None:
        """In a child process: a lock that another thread of the parent held would never be released."""
        self._lock = threading.Lock()


_executables: weakref.WeakSet[Executable] = weakref.WeakSet()


def _after_fork() -> None:
    for executable in _executables:
        executable.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _index_message(launch: Launch) -> str:
    kernel = launch.kernel
    tables = ", ".join(f"0 <= index < {indirect.extent}" for indirect in kernel.indirects)
    where = f" ({kernel.sources[0]})" if kernel.sources else ""
    return f"kernel {kernel.name}{where}: an index is outside its table; expected {tables}"
