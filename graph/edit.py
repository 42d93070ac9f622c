"""How a graph may change: the only place that makes nodes and writes their metadata.

    new = insert_node(graph, before=old, target=aten.gelu.default, args=(x,), made_by="fuse_gelu", like=old)
    replace(old, new)
    erase_dead(graph)

Every new node has run its shape rule under the graph's own FakeTensorMode, so `meta["val"]` is true by
construction; it inherits the source line of `like` and records the pass in `meta["made_by"]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from torchweld.graph.program import find_fake_mode, set_tensor, source_line
from torchweld.graph.shape_memo import ShapeMemo

INHERITED = ("stack_trace", "nn_module_stack")
SIZE_OF = torch.ops.aten.sym_size.int


class EditError(ValueError):
    """A node that a pass asked for is not possible: names the op, the place and what was expected."""


def insert_node(
    graph: fx.Graph,
    before: fx.Node,
    target: Callable[..., object],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    made_by: str,
    like: fx.Node,
    name: str | None = None,
    memo: ShapeMemo | None = None,
) -> fx.Node:
    """Insert a call of `target` (an OpOverload, or an operator on sizes) before `before` and run its shape
    rule.

    `args` and `kwargs` hold nodes, constants and (nested) lists of them; sizes that vary must be nodes
    (`size_of`). Raises `EditError` when an argument has no meta, a SymInt stands where a node must, or the
    shape rule refuses.  memo: shape rules that ran in this graph, for whoever writes many nodes.
    """
    keywords = dict(kwargs or {})
    mode = _fake_mode_of(graph, args, keywords)
    value = _run_shape_rule(mode, target, args, keywords, made_by, like, memo)
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, cast(Any, args), cast(Any, keywords), name=name)
    _annotate(node, value, made_by, like)
    return node


def insert_weight(
    graph_module: fx.GraphModule,
    before: fx.Node,
    name: str,
    tensor: torch.Tensor,
    *,
    made_by: str,
    like: fx.Node,
) -> fx.Node:
    """Store `tensor` on the module under the dotted `name` (replacing what is there) and read it by a
    `get_attr`."""
    graph = graph_module.graph
    set_tensor(graph_module, name, tensor)
    with graph.inserting_before(before):
        node = graph.create_node("get_attr", name)
    _annotate(node, fake_weight(find_fake_mode(graph), tensor), made_by, like)
    return node


def insert_module(
    graph_module: fx.GraphModule,
    before: fx.Node,
    name: str,
    module: nn.Module,
    args: tuple[fx.Node, ...],
    *,
    value: object,
    made_by: str,
    like: fx.Node,
) -> fx.Node:
    """Insert a `call_module` of `module`, stored under `name`; `value` is the meta of its result (a fused
    group already knows it: the metas of the nodes that it swallowed, as a tuple when it returns a tuple)."""
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.create_node("call_module", name, args)
    _annotate(node, value, made_by, like)
    return node


def size_of(graph: fx.Graph, before: fx.Node, source: fx.Node, dim: int, *, made_by: str) -> fx.Node | int:
    """Size of `source` along `dim`: the number itself when it is fixed, else a node that reads it at run
    time."""
    size = source.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    positive = dim % source.meta["val"].dim()
    for user in source.users:
        if user.target is SIZE_OF and user.args[1] == positive and comes_before(user, before):
            return user
    return insert_node(graph, before, SIZE_OF, (source, positive), made_by=made_by, like=source)


def comes_before(first: fx.Node, second: fx.Node) -> bool:
    """Does `first` stand before `second` in their graph?"""
    return first < second


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`; EditError when dtype, rank or a fixed size would change.

    `old` stays in the graph without users: `erase_dead` removes it.
    """
    before, after = old.meta.get("val"), new.meta.get("val")
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        same = (
            before.dtype == after.dtype
            and before.dim() == after.dim()
            and all(
                left == right
                for left, right in zip(before.shape, after.shape, strict=True)
                if isinstance(left, int) and isinstance(right, int)
            )
        )
        if not same:
            raise EditError(
                f"replacing {old.name} ({source_line(old)}) of {describe(before)} "
                f"by {new.name} of {describe(after)} made by {new.meta.get('made_by', '?')}: "
                "a replacement must keep dtype and shape"
            )
    users_of_new = set(new.all_input_nodes)
    # `new` may itself read `old` (a wrapper around it): that read must stay.
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new or old not in users_of_new)


def erase_dead(graph: fx.Graph) -> int:
    """Remove nodes that nothing reads and that write nothing; returns how many. Placeholders stay: they are
    the signature."""
    erased = 0
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output") or writes(node):
            continue
        graph.erase_node(node)
        erased += 1
    return erased


def drop_unused_tensors(graph_module: fx.GraphModule) -> int:
    """Delete weights and modules that no node reads any more, to free their memory; returns how many
    tensors."""
    before = sum(1 for _ in _all_tensors(graph_module))
    graph_module.delete_all_unused_submodules()
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in graph_module.graph.nodes if node.op == "call_module")
    for name, owner, leaf in list(_all_tensors(graph_module)):
        if name not in used and not (called and name.startswith(called)):
            delattr(owner, leaf)
    return before - sum(1 for _ in _all_tensors(graph_module))


def writes(node: fx.Node) -> bool:
    """Does this node mutate one of its arguments?"""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def fake_weight(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """A FakeTensor with the fixed shape, strides, dtype and device of `tensor`."""
    if isinstance(tensor, FakeTensor):
        return tensor
    # Making a fake asks for shapes only: nothing that notes reads of values (graph/value_reads.py) need see it.
    with torch._C.DisableTorchFunction():
        fake: torch.Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake


def describe(value: object) -> str:
    """`float32[2, s0, 64]` for a tensor meta; the type's name for anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    return type(value).__name__


def _annotate(node: fx.Node, value: object, made_by: str, like: fx.Node) -> None:
    for key in INHERITED:
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = value
    node.meta["made_by"] = made_by


def _run_shape_rule(
    mode: FakeTensorMode | None,
    target: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    made_by: str,
    like: fx.Node,
    memo: ShapeMemo | None = None,
) -> object:
    """Run `target` on the metas of its arguments."""

    def value_of(node: fx.Node) -> object:
        if "val" not in node.meta:
            raise EditError(
                f"{made_by}: argument {node.name} of {target} has no meta['val'] ({source_line(node)})"
            )
        return node.meta["val"]

    _refuse_loose_sizes(target, (args, kwargs), made_by)
    fake_args = fx.node.map_arg(cast(Any, args), cast(Any, value_of))
    fake_kwargs = fx.node.map_arg(cast(Any, dict(kwargs)), cast(Any, value_of))
    try:
        with torch.no_grad(), _quiet(mode):
            if memo is not None:
                return memo.run(target, fake_args, fake_kwargs)
            return target(*fake_args, **fake_kwargs)
    except Exception as problem:
        shown = ", ".join(describe(arg) if isinstance(arg, torch.Tensor) else repr(arg) for arg in fake_args)
        raise EditError(
            f"{made_by}: {target}({shown}) is not possible at {source_line(like)}: "
            f"{str(problem).splitlines()[0]}"
        ) from problem


@contextlib.contextmanager
def _quiet(mode: FakeTensorMode | None) -> Iterator[None]:
    """Enter `mode`; a question about a symbolic size is answered by its example and leaves no guard behind,
    because a pass must not turn a size that varies into a constant for the whole graph."""
    if mode is None:
        yield
        return
    environment = mode.shape_env
    with mode, environment.suppress_guards() if environment is not None else contextlib.nullcontext():
        yield


def _refuse_loose_sizes(target: object, arguments: object, made_by: str) -> None:
    def look(leaf: object) -> object:
        if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Tensor)):
            raise EditError(
                f"{made_by}: {target} got the bare {type(leaf).__name__} {leaf}; pass a node "
                "(size_of for sizes, insert_weight for tensors) so that the graph stays runnable"
            )
        return leaf

    fx.node.map_aggregate(cast(Any, arguments), cast(Any, look))


def _fake_mode_of(
    graph: fx.Graph, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> FakeTensorMode | None:
    """The mode of the first tensor argument; a factory such as `full` takes the graph's; None for size
    arithmetic in a graph without tensors."""
    found: list[FakeTensorMode] = []

    def look(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and not found:
            found.append(value.fake_mode)
        return node

    fx.node.map_arg(cast(Any, (args, dict(kwargs))), look)
    if found:
        return found[0]
    try:
        return find_fake_mode(graph)
    except ValueError:
        return None


def _all_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(dotted name, owner, leaf name) of every tensor, tied ones once per name."""
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        for leaf in [*owner._parameters, *owner._buffers]:
            if getattr(owner, leaf) is not None:
                yield (f"{path}.{leaf}" if path else leaf), owner, leaf
