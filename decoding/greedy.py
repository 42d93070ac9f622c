"""Plain greedy decoding by recomputation: every token runs the model over the whole sequence so far.

    next = argmax(logits(ids)[last position]);  ids = ids + next

Cost grows with the square of the length. It is the reference that cached, speculative and lookahead decoding
are compared with token by token, so it stays the simplest loop there is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor

from torchweld.decoding.logits import as_array, most_likely


class LogitsModel(Protocol):
    """A causal language model without state: ids int64 [1, S] -> logits of any float dtype [1, S, V]."""

    def __call__(self, ids: Tensor, /) -> Tensor: ...


class DecodingError(RuntimeError):
    """A prompt or logits that cannot be decoded from: names the shape or the place, and what was expected."""


def generate(
    model: LogitsModel, ids: Tensor, max_new_tokens: int, eos: Collection[int] = ()
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens, each as soon as it is known; ends before a token of `eos`.

    ids: the prompt, int64 [1, S] with S >= 1; not changed. Of equal logits the lowest token wins. Raises
    DecodingError for another shape, for logits of another shape, and where no logit is a number.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0 or ids.dtype != torch.int64:
        given = f"{ids.dtype} {tuple(ids.shape)}"
        raise DecodingError(f"the prompt is {given}; expected int64 [1, S] with S >= 1")
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            token = next_token(model(ids), ids.shape[1])
        if token in eos:
            return
        yield token
        ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)


def next_token(logits: Tensor, positions: int) -> int:
    """The most likely token after the last position; logits [1, positions, V], or [1, 1, V] of the last only.

    Raises DecodingError for another shape and for NaN, which would otherwise win silently.
    """
    fits = logits.dim() == 3 and logits.shape[0] == 1 and logits.shape[1] in (1, positions)
    if not fits or logits.shape[2] == 0:
        raise DecodingError(f"the model gave {tuple(logits.shape)}; expected logits [1, {positions}, V]")
    best = most_likely(as_array(logits[0, -1]))
    if best is None:
        raise DecodingError(f"the logits after position {positions - 1} hold NaN; check the model's weights")
    return best
