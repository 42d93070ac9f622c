"""Small exact StepModels: their logits follow from the tokens alone, the same bits in every call.

`ToyModel` keeps what a cache would keep and refuses what a cache would refuse, also a rollback deeper than `ring`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchweld.decoding.cache import CacheError
from torchweld.decoding.recompute import RecomputeModel
from torchweld.decoding.step_model import LogitsFor


class Markov:
    """Logits that depend on the last `order` tokens: ids [1, S] -> [1, S, V], float32."""

    def __init__(self, vocab_size: int, order: int = 1, seed: int = 0, spread: float = 2.0) -> None:
        self.vocab_size, self.order = vocab_size, order
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(vocab_size**order, vocab_size, generator=generator) * spread

    def __call__(self, ids: Tensor, /) -> Tensor:
        state = torch.zeros_like(ids)
        for back in range(self.order):
            shifted = torch.zeros_like(ids)
            shifted[:, back:] = ids[:, : ids.shape[1] - back]
            state = state + shifted * self.vocab_size**back
        return self.table[state]


class WholeText:
    """Logits that depend on every token before: a text that hardly repeats, and that one wrong row derails."""

    def __init__(self, vocab_size: int, seed: int = 0, spread: float = 2.0, states: int = 997) -> None:
        self.vocab_size, self.states = vocab_size, states
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(states, vocab_size, generator=generator) * spread

    def __call__(self, ids: Tensor, /) -> Tensor:
        state, rows = 1, []
        for token in ids[0].tolist():
            state = (state * 31 + token + 1) % self.states
            rows.append(state)
        return self.table[rows][None]


class ToyModel(RecomputeModel):
    """A StepModel over `forward`; `passes` holds the rows of every call of step, ring: rows that can be rolled back."""

    def __init__(
        self, forward: Markov | WholeText, max_length: int | None = None, ring: int | None = None
    ) -> None:
        super().__init__(forward, forward.vocab_size, max_length)
        self.ring = ring
        self.passes: list[int] = []
        self.prefills = 0

    @property
    def texts(self) -> list[list[int]]:
        """The cached tokens."""
        return [list(text) for text in self._texts]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        result = super().prefill(prompts)
        self.prefills += 1
        return result

    def step(
        self,
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
        logits_for: LogitsFor = "last",
    ) -> Tensor:
        result = super().step(ids, counts=counts, parents=parents, logits_for=logits_for)
        self.passes.append(int(ids.shape[1]))
        return result

    def truncate(self, length: int | Sequence[int]) -> tuple[int, ...]:
        wanted = [length] * len(self.lengths) if isinstance(length, int) else list(length)
        deepest = max(have - wish for have, wish in zip(self.lengths, wanted, strict=True))
        if self.ring is not None and deepest > self.ring:
            raise CacheError(
                f"cannot roll back {deepest} positions: the ring holds {self.ring} more than it needs"
            )
        return super().truncate(length)
