"""Trees of guesses: several continuations of a text in one pass, common beginnings once.

    tree = Tree()
    tree.add([5, 6, 7]);  tree.add([5, 8])
    tree.tokens, tree.parents            # (5, 6, 7, 8), (-1, 0, 1, 0)

A row of a pass depends on the tokens of its path alone, so two paths with a common beginning share the rows of it.
`parents` is all that a model needs: `visible` and `depths` say what it means as a mask and as positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROOT = -1
"""Parent of the guesses right behind the pending token."""


class Tree:
    """Tokens in the order in which they were added; every parent stands before its children."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token of every node."""
        return tuple(self._tokens)

    @property
    def parents(self) -> tuple[int, ...]:
        """The parent of every node, ROOT for the first tokens of paths."""
        return tuple(self._parents)

    def __len__(self) -> int:
        return len(self._tokens)

    def child(self, parent: int, token: int) -> int | None:
        """The node of `token` behind `parent`, if there is one."""
        return self._children.get((parent, token))

    def grow(self, parent: int, token: int) -> int:
        """The node of `token` behind `parent`; made where it is not there."""
        if not ROOT <= parent < len(self._tokens):
            raise ValueError(f"parent {parent} in a tree of {len(self._tokens)} nodes")
        node = self._children.setdefault((parent, token), len(self._tokens))
        if node == len(self._tokens):
            self._tokens.append(token)
            self._parents.append(parent)
        return node

    def add(self, path: Sequence[int], parent: int = ROOT) -> list[int]:
        """Add a path of tokens behind `parent`; returns its nodes."""
        nodes = []
        for token in path:
            parent = self.grow(parent, token)
            nodes.append(parent)
        return nodes

    def missing(self, path: Sequence[int], parent: int = ROOT) -> int:
        """How many nodes `add` would make."""
        for number, token in enumerate(path):
            child = self.child(parent, token)
            if child is None:
                return len(path) - number
            parent = child
        return 0


def depths(parents: Sequence[int]) -> list[int]:
    """Nodes above each node, itself included: 1 right behind the root. A row's position is the root's plus this.

    Raises ValueError where a parent does not stand before its child.
    """
    found: list[int] = []
    for node, parent in enumerate(parents):
        if not ROOT <= parent < node:
            raise ValueError(f"node {node} has parent {parent}; expected {ROOT} to {node - 1}")
        found.append(1 if parent == ROOT else found[parent] + 1)
    return found


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """The nodes from the root's child down to `node`; [] for the root."""
    path = []
    while node != ROOT:
        path.append(node)
        node = parents[node]
    return path[::-1]


def visible(parents: Sequence[int]) -> Tensor:
    """bool [n, n]: may row i attend to row j? Exactly to the nodes of its path."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            mask[node] |= mask[parent]
    return mask


def leaf_paths(parents: Sequence[int]) -> list[list[int]]:
    """The paths from the root to every node without children, in the order of these nodes."""
    inner = set(parents)
    return [path_to(parents, node) for node in range(len(parents)) if node not in inner]
