"""Fill the padding mask of a captured model with ones: a step has no padding that an attention could see.

before:  f(ids[B, S], attention_mask[B, S])       visible = causal & (attention_mask != 0)
after:   f(ids[B, S])                             visible = causal & (ones != 0)
why:     a step is derived from tokens alone; what the mask then comes to is proved, not assumed
legal:   the input is called attention_mask, holds integers or truth values, and is as large as the tokens; with tokens
         of another length too it may be the mask of an encoder's source, and stays
source:  the convention of Hugging Face: 1 for tokens, 0 for padding

This is no pass over a fixed meaning: it chooses the value of an input. It is right for sequences without padding, and
those are all that a cache is ever fed.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from torchweld.graph.edit import insert_node
from torchweld.graph.match import aten, is_tensor, shape_of, tensor_of
from torchweld.graph.program import Program

NAME: Final = "fill_padding_mask"
MASK: Final = "attention_mask"


def fill_padding_mask(program: Program) -> Program:
    """A copy of `program` whose padding mask is all ones; the program itself where it reads none."""
    if _find_mask(program) is None:
        return program
    copy = program.copied()
    mask = _find_mask(copy)
    assert mask is not None
    tokens = next(node for node in copy.placeholders if _may_be_tokens(node, mask))
    first = next(node for node in copy.graph.nodes if node.op != "placeholder")
    dtype = tensor_of(mask).dtype
    ones = insert_node(
        copy.graph, first, aten.ones_like.default, (tokens,), {"dtype": dtype}, made_by=NAME, like=mask
    )
    mask.replace_all_uses_with(ones)
    copy.graph_module.recompile()
    return copy


def _find_mask(program: Program) -> fx.Node | None:
    for node in program.placeholders:
        if node.name != MASK or not is_tensor(node) or not node.users:
            continue
        kind = tensor_of(node).dtype
        if any(_is_other_text(other, node) for other in program.placeholders):
            continue
        if kind in (torch.int64, torch.int32, torch.bool) and any(
            _may_be_tokens(other, node) for other in program.placeholders
        ):
            return node
    return None


def _is_other_text(node: fx.Node, mask: fx.Node) -> bool:
    """Are these tokens of another length?"""
    if not is_tensor(node) or not node.users or tensor_of(node).dtype != torch.int64:
        return False
    return len(shape_of(node)) == 2 and shape_of(node) != shape_of(mask)


def _may_be_tokens(node: fx.Node, mask: fx.Node) -> bool:
    """Is this another input with the batch and sequence of the mask?"""
    return node is not mask and is_tensor(node) and bool(node.users) and shape_of(node)[:2] == shape_of(mask)
