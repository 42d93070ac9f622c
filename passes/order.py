"""The order in which the passes normalise a captured graph, and in which the fusions work on its groups."""

from __future__ import annotations

from typing import Any, Final

from torchweld.graph.fusion import FusionPass
from torchweld.graph.rewrite import Pass
from torchweld.passes import (
    canonicalize_activations,
    canonicalize_arithmetic,
    canonicalize_biases,
    canonicalize_einsum,
    canonicalize_identities,
    canonicalize_linear,
    canonicalize_lookups,
    canonicalize_scores,
    canonicalize_slices,
    canonicalize_views,
    eliminate_common_subexpressions,
    fold_constants,
    fuse_horizontal,
    fuse_input,
    fuse_output,
    fuse_vertical,
    recognize_attention,
    recognize_convolution,
    recognize_layer_norm,
    recognize_rms_norm,
    recognize_rope,
    remove_dead_code,
)

CANONICALIZE: Final[tuple[Pass[Any], ...]] = (
    # What nothing reads would only be rewritten in vain.
    remove_dead_code,
    # Views first: the rules of all later passes know reshape and permute only, and a contiguous copy may
    # only go once no aten.view relies on it.
    canonicalize_views,
    canonicalize_slices,
    # Before folding, which turns the reshaped weight of an einsum back into a weight.
    canonicalize_einsum,
    canonicalize_identities,
    # Before folding, so that thirty equal factories become one constant rather than thirty.
    eliminate_common_subexpressions,
    # Before arithmetic, which asks whether an operand is a constant number.
    fold_constants,
    canonicalize_arithmetic,
    # Folding and arithmetic leave x * 1 and views of views; linear and activations match through neither.
    canonicalize_identities,
    canonicalize_views,
    canonicalize_slices,
    canonicalize_identities,
    canonicalize_activations,
    canonicalize_lookups,
    canonicalize_scores,
    canonicalize_linear,
    # linear leaves permute(weight) for [in, out] weights.
    canonicalize_views,
    fold_constants,
    eliminate_common_subexpressions,
    canonicalize_identities,
)
"""One spelling per idea. Exact, but for the reassociation that single passes declare."""

RECOGNIZE: Final[tuple[Pass[Any], ...]] = (
    # Layer norm before RMS norm: with d = x - mean(x), its second half alone is an RMS norm of d.
    recognize_layer_norm,
    recognize_rms_norm,
    recognize_rope,
    # After rope and norms: nothing in an attention needs them, but what it leaves dead is less.
    recognize_attention,
    # What stayed a tensor beside the mask that was proved.
    canonicalize_biases,
    recognize_convolution,
    # Attention leaves permutes of permutes, reshapes back and forth, and masks that nothing reads.
    canonicalize_views,
    canonicalize_identities,
    eliminate_common_subexpressions,
    remove_dead_code,
)
"""Spelled-out norms, rotary embeddings and attention by their names; wants a canonical graph."""

FUSE: Final[tuple[FusionPass, ...]] = (
    # Siblings first: once q, k and v are one group, the norm in front of them has one reader and can join it.
    fuse_input,
    fuse_vertical,
    # Concatenations and sums of matmuls, which vertical fusion leaves to this pass.
    fuse_output,
    # What the two before made can be siblings, producers and consumers again.
    fuse_input,
    fuse_vertical,
    # Last: joining independent work is worth one launch, every other fusion saves bytes as well.
    fuse_horizontal,
)
"""The four fusions, over the group graph."""
