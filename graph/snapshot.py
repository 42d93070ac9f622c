"""Did a call write to its inputs? Remember their storages before, compare them afterwards.

The whole storage is kept, not the view: a kernel that writes *beside* a sliced input is caught as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Snapshot:
    """The bytes of every input's whole storage, and how the input looked at it."""

    storages: tuple[Tensor | None, ...]
    views: tuple[tuple[object, ...], ...]


def snapshot(inputs: object) -> Snapshot:
    """Remember `inputs` (a pytree) so that `inputs_unchanged` can tell later whether a call wrote to them.

    The whole storage is kept, not the view: a kernel that writes beside a sliced input is caught as well.
    """
    leaves = tree_leaves(inputs)
    return Snapshot(tuple(_storage(leaf) for leaf in leaves), tuple(_view(leaf) for leaf in leaves))


def changed_inputs(before: Snapshot, after: object) -> tuple[str, ...]:
    """Return one sentence per input of `after` whose storage, shape, strides or dtype differ from the
    snapshot."""
    leaves = tree_leaves(after)
    if len(leaves) != len(before.storages):
        return (f"{len(leaves)} inputs, {len(before.storages)} were remembered",)
    changes: list[str] = []
    for i, (leaf, storage, view) in enumerate(zip(leaves, before.storages, before.views, strict=True)):
        now = _storage(leaf)
        if _view(leaf) != view:
            changes.append(f"input {i}: was {view}, is {_view(leaf)}")
        elif storage is not None and now is not None and not torch.equal(storage, now):
            changes.append(
                f"input {i}: {int((storage != now).sum())} of {storage.numel()} bytes of its storage changed"
            )
    return tuple(changes)


def inputs_unchanged(before: Snapshot, after: object) -> bool:
    """Return True if every input has the bits, shape, strides and dtype that it had at `snapshot`."""
    return not changed_inputs(before, after)


def _storage(leaf: object) -> Tensor | None:
    if not isinstance(leaf, Tensor):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(leaf.detach().untyped_storage()).clone()


def _view(leaf: object) -> tuple[object, ...]:
    if not isinstance(leaf, Tensor):
        return (leaf,)
    return tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype
