"""Example inputs of a capture: which dimensions vary, and the same inputs at other sizes.

A dimension has a role: "batch" (dim 0 of every tensor), "sequence" (dim 1 of integer and boolean tensors of
rank 2 and more, and of float tensors of rank 3, which are hidden states). Dimensions of one role and one
example size move together: `attention_mask` follows `input_ids`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.utils._pytree as pytree
from torch import nn

from torchweld.graph.capture_errors import CaptureError

Role = Literal["batch", "sequence", "other"]
Family = tuple[Role, int]  # dimensions of one role and one example size


@dataclass(frozen=True)
class Axis:
    """One dimension that may vary: leaf number, dimension, its role and the size in the user's example."""

    leaf: int
    dim: int
    role: Role
    size: int
    free: bool  # may take any length: true for integers; a float tensor's length may be fixed by weights

    @property
    def family(self) -> Family:
        """Axes of one family change together."""
        return self.role, self.size


@dataclass(frozen=True)
class Example:
    """Flattened example inputs: `leaves` in pytree order, `names` a readable path for each, `axes` what may
    vary."""

    leaves: tuple[object, ...]
    names: tuple[str, ...]
    spec: pytree.TreeSpec
    parameters: tuple[str, ...]
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[Axis, str], ...] = ()

    def fixing(self, families: Mapping[Family, str]) -> Example:
        """The same example in which the axes of `families` may not vary, each with its reason."""
        gone = tuple((axis, families[axis.family]) for axis in self.axes if axis.family in families)
        left = tuple(axis for axis in self.axes if axis.family not in families)
        return replace(self, axes=left, fixed=self.fixed + gone)

    @property
    def tensor_positions(self) -> tuple[int, ...]:
        """Which leaves are tensors; the others are baked into the graph."""
        return tuple(i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor))

    def resized(self, sizes: Mapping[Family, int]) -> tuple[object, ...]:
        """Fresh leaves in which every axis of a named family has the new size (contents repeat).

        Always copies: torch.export leaves marks on the tensors it sees."""
        leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        for axis in self.axes:
            size = sizes.get(axis.family, axis.size)
            leaf = leaves[axis.leaf]
            if isinstance(leaf, torch.Tensor) and size != axis.size:
                index = torch.arange(size, device=leaf.device) % axis.size
                leaves[axis.leaf] = leaf.index_select(axis.dim, index)
        return tuple(leaves)


def flatten_example(
    model: nn.Module | Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    dynamic: bool | Mapping[str, Collection[int]],
) -> Example:
    """Describe the example inputs of `model`; CaptureError when `dynamic` names an input that does not
    exist."""
    paths, spec = pytree.tree_flatten_with_path((args, dict(kwargs)))
    parameters = positional_names(model, len(args))
    names = tuple(_path_name(path, parameters) for path, _ in paths)
    leaves = tuple(leaf for _, leaf in paths)
    tensors = [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)]
    empty = [
        name
        for name, leaf in zip(names, leaves, strict=True)
        if isinstance(leaf, torch.Tensor) and not leaf.numel()
    ]
    if not tensors or empty:
        raise CaptureError(
            f"the example input {empty[0]!r} is empty" if empty else "no example input is a tensor",
            "capture(args)",
            "example tensors with at least one element",
            "pass inputs like those of a real call",
        )
    if isinstance(dynamic, Mapping):
        axes = _chosen_axes(leaves, names, dynamic)
    else:
        axes = _default_axes(leaves) if dynamic else ()
    return Example(leaves, names, spec, parameters, axes)


def positional_names(model: nn.Module | Callable[..., object], count: int) -> tuple[str, ...]:
    """Names of the first `count` parameters of the model's signature."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "arg")
    return tuple(named[i] if i < len(named) else f"{rest}_{i - len(named)}" for i in range(count))


def _path_name(path: tuple[object, ...], parameters: tuple[str, ...]) -> str:
    """`input_ids`, or `cache.0.key` for a leaf inside a structure."""
    root, first, *rest = path
    assert isinstance(root, pytree.SequenceKey)
    head = (
        parameters[first.idx] if isinstance(first, pytree.SequenceKey) else str(getattr(first, "key", first))
    )
    return ".".join([head, *(str(getattr(k, "idx", getattr(k, "key", getattr(k, "name", k)))) for k in rest)])


def _default_axes(leaves: tuple[object, ...]) -> tuple[Axis, ...]:
    axes = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            continue
        whole = not leaf.is_floating_point() and not leaf.is_complex()
        # A vector is a sequence without a batch (packed tokens, positions); either way one axis varies.
        axes.append(Axis(number, 0, "batch", leaf.shape[0], whole or leaf.dim() > 1))
        if (whole and leaf.dim() >= 2) or leaf.dim() == 3:
            axes.append(Axis(number, 1, "sequence", leaf.shape[1], whole))
    return tuple(axes)


def _chosen_axes(
    leaves: tuple[object, ...], names: tuple[str, ...], dynamic: Mapping[str, Collection[int]]
) -> tuple[Axis, ...]:
    axes = []
    for name, dims in dynamic.items():
        leaf = leaves[names.index(name)] if name in names else None
        if not isinstance(leaf, torch.Tensor) or any(not 0 <= dim < leaf.dim() for dim in dims):
            raise CaptureError(
                f"dynamic names {name!r} {sorted(dims)}",
                "capture(dynamic=...)",
                f"dimensions of the tensor inputs {', '.join(names)}",
                "correct the name or the dimension",
            )
        roles: tuple[Role, ...] = ("batch", "sequence")
        for dim in dims:
            role: Role = roles[dim] if dim < 2 else "other"
            axes.append(Axis(names.index(name), dim, role, leaf.shape[dim], not leaf.is_floating_point()))
    return tuple(axes)
