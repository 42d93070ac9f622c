"""What a derived step is: the program, and what each of its layers keeps (passes/rewrite_kv_cache.py derives it)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchweld.graph.program import Program


@dataclass(frozen=True)
class LayerState:
    """What one attention keeps: keys [B, heads, C, key_features] and values [B, heads, C, value_features].

    kind "causal" keeps every position (window 0), "window" the last `window`; `mask_proof`: how the mask was proved.
    All other kinds keep rows [B, 1, C, key_features] alone (value_features 0), the last `window` of them:
    "convolution"; "cumulative sum", "cumulative product", "cumulative log-sum-exp", "cumulative maximum" and
    "cumulative minimum", the value so far; "scan" and "associative scan", one carry.  node: the name of the op in the
    source program, which may have several states.
    """

    node: str
    kind: str
    window: int
    heads: int
    key_features: int
    value_features: int
    dtype: torch.dtype
    mask_proof: str

    @property
    def features(self) -> tuple[int, ...]:
        """The last axis of every cache that it needs."""
        return (self.key_features, self.value_features) if self.value_features else (self.key_features,)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one position of one sequence adds."""
        return self.heads * (self.key_features + self.value_features) * self.dtype.itemsize


@dataclass(frozen=True)
class StepProgram:
    """A program of the signature above: (logits [1, R, V], caches) of the inputs of passes/step_inputs.py.

    states: one per pair of caches, or cache, in order; those of equal window share a capacity.  limit: positions that
    the model's tables and the capture allow; None where nothing limits them.  vocabulary: V.  token_limit: tokens that
    the model's embedding has; None where it is unknown.  is_tree: the program has the input `path`.  encoder: gives the
    inputs encoded_i; None where there is none.  crosses: what each cross attention reads of it, per source position.
    chooses: the program has the input and the results of passes/step_choice.py.
    """

    program: Program
    states: tuple[LayerState, ...]
    limit: int | None
    vocabulary: int
    token_limit: int | None
    is_tree: bool
    encoder: Program | None = None
    crosses: tuple[LayerState, ...] = ()
    chooses: bool = False
