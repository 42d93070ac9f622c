"""What a captured program is: a runnable, functional ATen graph with its weights and its pytree signature.

A `Program` holds a `torch.fx.GraphModule` in which
* every leaf of the caller's inputs is one placeholder, in pytree order (also leaves the graph does not read);
* every node in between is a functional ATen overload, one of our own ops, or arithmetic on symbolic sizes;
* weights and constants are `get_attr` nodes under the names of the source model's state_dict;
* the output node returns one flat tuple.
`node.meta["val"]` is a FakeTensor (or SymInt) and `node.meta["stack_trace"]` the user's source.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

TORCH_FOLDER = str(Path(torch.__file__).resolve().parent)
STANDARD_LIBRARY = str(Path(functools.__file__).resolve().parent)
OWN_FOLDER = str(Path(__file__).resolve().parent)
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*\n?(?P<code>[^\n]*)')


@dataclass(frozen=True)
class StaticDim:
    """A dimension that had to keep the example's size: calling with another size is an error."""

    input: str  # path of the input in the signature, such as "input_ids"
    dim: int
    size: int
    reason: str


@dataclass(frozen=True)
class SizeRange:
    """A dimension that may vary from `low` to `high` (None: no limit)."""

    input: str
    dim: int
    low: int
    high: int | None


@dataclass(frozen=True)
class Program:
    """A captured program.

    `in_spec` is the pytree spec of `(args, kwargs)`, `out_spec` that of the result; `parameters` names the
    positional arguments, so that callers may also pass them by name. `guards` are the assertions which
    capture removed from the graph, as text. Raises `TypeError` from `run` when the arguments do not fit the
    signature.
    """

    graph_module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    name: str
    parameters: tuple[str, ...] = ()
    sizes: tuple[SizeRange, ...] = ()
    static_dims: tuple[StaticDim, ...] = ()
    guards: tuple[str, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph itself (edit it through `torchweld.graph.edit`, then `graph_module.recompile()`)."""
        return self.graph_module.graph

    @property
    def placeholders(self) -> tuple[fx.Node, ...]:
        """Input nodes, one per leaf of `in_spec`."""
        return tuple(self.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> tuple[fx.node.Argument, ...]:
        """What the output node returns, one entry per leaf of `out_spec` (nodes, or constants such as
        None)."""
        returned = self.graph.output_node().args[0]
        assert isinstance(returned, (tuple, list))
        return tuple(returned)

    @property
    def fake_inputs(self) -> tuple[object, ...]:
        """Meta value of every placeholder: FakeTensors, SymInts or plain constants."""
        return tuple(node.meta.get("val") for node in self.placeholders)

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The FakeTensorMode that all metas of this graph live in."""
        return find_fake_mode(self.graph)

    def run(self, *args: object, **kwargs: object) -> object:
        """Execute the graph without autograd and give the result back in the source model's structure."""
        flat = self.flatten_inputs(args, dict(kwargs))
        with torch.no_grad():
            return self.unflatten_outputs(self.graph_module(*flat))

    def check_inputs(self, flat: list[object]) -> None:
        """ValueError when a flat input has a dtype, device, rank or size that the capture does not allow,
        when two inputs that share a symbolic size differ in it, or when a baked-in constant has another
        value."""
        seen: dict[str, int] = {}
        for node, value in zip(self.placeholders, flat, strict=True):
            wanted = node.meta.get("val")
            if isinstance(wanted, torch.Tensor):
                problem = _tensor_mismatch(wanted, value, seen)
                expected = f"{wanted.dtype} {tuple(wanted.shape)} on {wanted.device}"
            else:
                problem = None if isinstance(wanted, torch.SymInt) or wanted == value else f"is {value!r}"
                expected = repr(wanted)
            if problem:
                raise ValueError(f"{self.name}: input {node.name!r} {problem}; captured for {expected}")

    def flatten_inputs(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[object]:
        """Leaves of `(args, kwargs)` in placeholder order; arguments may come by position or by name."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec == self.in_spec:
            return leaves
        leaves, spec = pytree.tree_flatten(self._bind(args, kwargs))
        if spec != self.in_spec:
            raise TypeError(
                f"{self.name}: arguments have the structure {spec}, but the program was captured with "
                f"{self.in_spec}; capture it again with inputs of this structure"
            )
        return leaves

    def unflatten_outputs(self, flat: tuple[object, ...]) -> object:
        """Put flat results back into the source model's output structure."""
        return pytree.tree_unflatten(list(flat), self.out_spec)

    def copied(self) -> Program:
        """The same program over a copy of the graph; tensors are shared."""
        copy = fx.GraphModule(self.graph_module, copy_graph(self.graph))
        return replace(self, graph_module=copy)

    def _bind(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[object, dict[str, object]]:
        """Sort arguments the way capture saw them, by parameter name."""
        keywords: list[str] = list(self.in_spec.child(1).context or [])
        names = [*self.parameters, *keywords]
        if len(args) > len(names):
            raise TypeError(
                f"{self.name}: takes {len(names)} arguments ({', '.join(names)}), got {len(args)}"
            )
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names or name in given:
                problem = "was given twice" if name in given else "was not part of the capture"
                raise TypeError(f"{self.name}: argument {name!r} {problem}; expected {', '.join(names)}")
            given[name] = value
        missing = [name for name in names if name not in given]
        if missing:
            raise TypeError(
                f"{self.name}: missing argument {missing[0]!r}; the program takes {', '.join(names)}"
            )
        return tuple(given[name] for name in self.parameters), {name: given[name] for name in keywords}


def _tensor_mismatch(wanted: torch.Tensor, value: object, seen: dict[str, int]) -> str | None:
    """What is wrong with `value`; `seen` collects the sizes of symbols over all inputs."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}"
    if value.dtype != wanted.dtype or value.device != wanted.device:
        return f"is {value.dtype} on {value.device}"
    if value.dim() != wanted.dim():
        return f"has shape {tuple(value.shape)}"
    for dim, (size, given) in enumerate(zip(wanted.shape, value.shape, strict=True)):
        known = size if isinstance(size, int) else seen.setdefault(str(size), given)
        if known != given:
            return f"has shape {tuple(value.shape)}, but dimension {dim} must have size {known}"
    return None


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` with the metas of its nodes."""
    copy = fx.Graph()
    returned = copy.graph_copy(graph, val_map={}, return_output_node=True)
    assert isinstance(returned, tuple)
    result, old_output = returned
    copy.output(result).meta.update(old_output.meta)
    return copy


def find_fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The FakeTensorMode of the metas in `graph`; ValueError when no node has one."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
        if isinstance(value, (tuple, list)):
            for part in value:
                if isinstance(part, FakeTensor):
                    return part.fake_mode
    raise ValueError("no node of this graph has a FakeTensor in meta['val']; was it captured by torchweld?")


def get_tensor(graph_module: nn.Module, name: str) -> torch.Tensor:
    """The weight or constant that a `get_attr` node with target `name` reads; AttributeError or TypeError
    when there is none."""
    value = functools.reduce(getattr, name.split("."), graph_module)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, not a tensor of the captured program")
    return value


def set_tensor(graph_module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Store `tensor` under the dotted `name`, making the modules on the way; parameters stay parameters."""
    *path, leaf = name.split(".")
    module = graph_module
    for step in path:
        child = getattr(module, step, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            module.add_module(step, child)
        module = child
    if leaf in module._parameters or leaf in module._buffers:
        delattr(module, leaf)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def source_frames(node: fx.Node) -> list[tuple[str, int, str]]:
    """(file, line, code) of the user's frames, outermost first; empty when the node has no trace."""
    trace = node.meta.get("stack_trace")
    if not isinstance(trace, str):
        return []
    frames = [(m["file"], int(m["line"]), m["code"].strip()) for m in FRAME.finditer(trace)]
    return [frame for frame in frames if not is_machinery(frame[0])] or frames


def source_line(node: fx.Node) -> str:
    """`file.py:123: code` of the innermost line of the user's model that made `node`, or "<no source>"."""
    frames = source_frames(node)
    if not frames:
        return "<no source>"
    file, line, code = frames[-1]
    where = f"{Path(file).name}:{line}"
    return f"{where}: {code}" if code else where


@functools.lru_cache(maxsize=4096)
def is_machinery(file: str) -> bool:
    """Is `file` part of torch, of the interpreter, or of this room (the wrapper around the user's model)?"""
    if file.startswith("<"):
        return "frozen" in file or "eval_with_key" in file
    path = str(Path(file).resolve())
    # Without a virtual environment, installed packages live below the standard library.
    standard = path.startswith(STANDARD_LIBRARY) and "-packages" not in path
    return standard or path.startswith((TORCH_FOLDER, OWN_FOLDER))
