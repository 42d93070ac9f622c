"""Trees of guesses: shared beginnings, and what `parents` means, against the rules spelled out densely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchweld.decoding.tree import ROOT, Tree, depths, leaf_paths, path_to, visible

paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=8)


@given(paths)
def test_a_tree_holds_every_beginning_of_its_paths_once(given_paths: list[list[int]]) -> None:
    tree = Tree()
    for path in given_paths:
        missing, before = tree.missing(path), len(tree)
        nodes = tree.add(path)
        assert len(tree) == before + missing
        assert [tree.tokens[node] for node in nodes] == path
        assert tree.missing(path) == 0
        assert path_to(tree.parents, nodes[-1]) == nodes
    beginnings = {tuple(path[:end]) for path in given_paths for end in range(1, len(path) + 1)}
    spelled = [tuple(tree.tokens[n] for n in path_to(tree.parents, node)) for node in range(len(tree))]
    assert set(spelled) == beginnings and len(spelled) == len(beginnings)


@given(paths)
def test_mask_and_positions_are_those_of_the_paths(given_paths: list[list[int]]) -> None:
    tree = Tree()
    for path in given_paths:
        tree.add(path)
    mask, deep = visible(tree.parents), depths(tree.parents)
    for node in range(len(tree)):
        path = path_to(tree.parents, node)
        assert mask[node].nonzero().flatten().tolist() == sorted(path)
        assert deep[node] == len(path)
        assert path == sorted(path), "a parent stands before its child"
    ends = {path[-1] for path in leaf_paths(tree.parents)}
    assert ends == set(range(len(tree))) - set(tree.parents)


def test_one_path_is_a_causal_triangle() -> None:
    parents = (ROOT, 0, 1, 2)
    assert torch.equal(visible(parents), torch.ones(4, 4).tril().bool())
    assert depths(parents) == [1, 2, 3, 4]
    assert leaf_paths(parents) == [[0, 1, 2, 3]]
    assert path_to(parents, ROOT) == []


def test_a_parent_behind_its_child_is_refused() -> None:
    with pytest.raises(ValueError, match="node 0 has parent 0; expected -1 to -1"):
        depths((0,))
    with pytest.raises(ValueError, match="parent 3 in a tree of 0 nodes"):
        Tree().grow(3, 1)
