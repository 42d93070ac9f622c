"""Torch's scans in a captured graph: one call of a `Scan` (graph/ops/scan.py) in place of a control-flow operator.

before:  carry, ys = higher_order.scan(body, init, xs, closed over)     body: a sub-graph with a copy of small constants
         ys = higher_order.associative_scan(body, xs, closed over)
after:   ys = Scan(body, ...)(init, xs, [*closed over, *constants]);    the last carry is the last of all carries

torch.export keeps a scan as an operator, but for two things that `keep_scans` mends while a model is traced:
* An associative scan in the mode "generic", the only one that torch runs on a CPU, is unrolled into the pairs of one
  length. It is traced as the operator that it is.
* Every scan is compiled by Dynamo, with one cache for the whole process. Entries of other models are tried first, and a
  guard of theirs on a size that equals the traced one fixes that size here. A trace has a cache of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from torchweld.graph.capture_errors import CaptureError
from torchweld.graph.edit import INHERITED
from torchweld.graph.ops.scan import Scan
from torchweld.graph.program import source_line

aten = torch.ops.aten
SCANS: Final = ("scan", "associative_scan")
# The modules: as attributes of their package these names are functions.
_ASSOCIATIVE: Final[Any] = importlib.import_module("torch._higher_order_ops.associative_scan")
_MODULES: Final[tuple[Any, ...]] = (importlib.import_module("torch._higher_order_ops.scan"), _ASSOCIATIVE)
Read = Callable[[str, torch.Tensor, fx.Node], fx.Node]


@contextlib.contextmanager
def keep_scans() -> Iterator[None]:
    """Within this context torch traces every scan as one operator, whatever it has run before."""
    before = [(module, module._maybe_compile_and_run_fn) for module in _MODULES]
    generic = _ASSOCIATIVE.generic_associative_scan
    for module, compile_and_run in before:
        module._maybe_compile_and_run_fn = functools.partial(_run_afresh, compile_and_run)
    _ASSOCIATIVE.generic_associative_scan = functools.partial(_as_operator, generic)
    try:
        yield
    finally:
        for module, compile_and_run in before:
            module._maybe_compile_and_run_fn = compile_and_run
        _ASSOCIATIVE.generic_associative_scan = generic


def _run_afresh(
    compile_and_run: Callable[..., object], function: types.FunctionType, *args: object
) -> object:
    """`compile_and_run(function, *args)` with a copy of the function's code, on which Dynamo has cached nothing."""
    code = function.__code__.replace()
    fresh = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    return compile_and_run(fresh, *args)


def _as_operator(
    unroll: Callable[..., Any], combine: Any, leaves: list[torch.Tensor], **options: object
) -> Any:
    """The generic associative scan as the operator."""
    pairwise = _without_vmap(combine)
    if pairwise is None:
        return unroll(combine, leaves, **options)

    def run(body: Callable[..., object], rows: list[torch.Tensor]) -> object:
        return _ASSOCIATIVE.associative_scan_op(body, rows, additional_inputs=())

    return pytree.tree_leaves(_ASSOCIATIVE._maybe_compile_and_run_fn(run, pairwise, leaves))


def _without_vmap(combine: Any) -> Callable[..., object] | None:
    """`combine` on single elements, where it is what `associative_scan` makes of the user's function with vmap."""
    keywords = getattr(combine, "keywords", {})
    batched = keywords.get("combine_fn")
    inner = getattr(batched, "__wrapped__", None)
    if inner is None and inspect.isfunction(batched):
        inner = inspect.getclosurevars(batched).nonlocals.get("func")
    if not callable(inner):
        return None
    return functools.partial(combine.func, **{**keywords, "combine_fn": inner})


def add_scan(
    graph: fx.Graph,
    node: fx.Node,
    body: fx.GraphModule,
    args: tuple[Any, ...],
    mode: FakeTensorMode,
    read: Read,
) -> tuple[object, ...]:
    """Write what stands for the scan `node` at the end of `graph`: its results, in order.

    body, args: its sub-graph, and the copies of its other arguments.  read: makes a node of a constant of the body.
    Raises CaptureError for a body that calls another sub-graph.
    """
    initial, rows, shared = args if str(node.target) == "scan" else ((), *args)
    plain, constants = _lift(body, node)
    closed = [*shared, *(read(f"{node.name}_{name}", tensor, node) for name, tensor in constants.items())]
    carries, fakes = len(initial) or len(rows), node.meta["val"]
    # An associative scan has no other results than its carries, one per row.
    states = _last_carries(node, carries) if initial else tuple(range(carries))
    length = rows[0].meta["val"].shape[0]
    with mode:
        kept = (
            [fakes[state].new_empty((length, *fakes[state].shape)) for state in states] if initial else fakes
        )
    values = (*kept, *fakes[carries:])
    operands = (list(initial), list(rows), closed)
    call = _call(graph, Scan(plain, carries, states), operands, values, node)
    parts = [_call(graph, operator.getitem, (call, place), fake, node) for place, fake in enumerate(values)]
    if not initial:
        return tuple(parts)
    last: list[object] = [None] * carries
    for part, state in zip(parts, states, strict=False):
        last[state] = _call(graph, aten.select.int, (part, 0, -1), fakes[state], node)
    return *last, *parts[len(states) :]


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: object, like: fx.Node) -> fx.Node:
    """A new node at the end of the graph, made at the source line of `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in INHERITED if key in like.meta}
    node.meta["val"] = value
    return node


def _last_carries(node: fx.Node, carries: int) -> tuple[int, ...]:
    """The carries that are read behind the last row."""
    read = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    return tuple(number for number in range(carries) if number in read)


def _lift(body: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, Mapping[str, torch.Tensor]]:
    """The body with its constants as further inputs, and these."""
    graph = fx.Graph()
    constants: dict[str, torch.Tensor] = {}
    copies: dict[fx.Node, fx.Node] = {}
    last: fx.Node | None = None
    for inner in body.graph.nodes:
        value = getattr(body, str(inner.target), None) if inner.op == "get_attr" else None
        if inner.op == "output":
            graph.output(fx.node.map_arg(inner.args[0], copies.__getitem__))
        elif inner.op == "placeholder":
            last = copies[inner] = graph.placeholder(inner.name)
        elif isinstance(value, torch.Tensor):
            with graph.inserting_after(last) if last is not None else contextlib.nullcontext():
                last = copies[inner] = graph.placeholder(inner.name)
            constants[inner.name] = value
        elif inner.op == "call_function" and not isinstance(inner.target, torch._ops.HigherOrderOperator):
            copies[inner] = graph.node_copy(inner, copies.__getitem__)
        else:
            raise CaptureError(
                f"{inner.op} {inner.target} in the body of a scan",
                source_line(node),
                "a body of tensor operations",
                "compute both branches and select with torch.where, and put no scan inside a scan",
            )
    return fx.GraphModule(torch.nn.Module(), graph, "Body"), constants
