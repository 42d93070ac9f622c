"""Medusa: small heads on the last hidden state guess the tokens after the next one; a tree of guesses is verified.

    head k        h_k = h + silu(W_k h + b_k);   logits_k = output head(h_k), the model's own
    guesses       h gave the pending token; head k's best tokens are guesses k places behind it
    tree          a choice (r1, r2, ...) is a path: rank r1 of head 1, then rank r2 of head 2, ...

Source: Cai et al., Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads (2024). Acceptance
is the one rule of decoding/accept.py, which is lossless; the paper's typical acceptance is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchweld.decoding.chance import Chance
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.logits import as_array, likeliest
from torchweld.decoding.step_model import Budget, DecodingError, Outcome, Proposal
from torchweld.decoding.tree import ROOT, Tree
from torchweld.decoding.warp import Warp
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.models.errors import ModelFileError
from torchweld.optimizer.compile import Options, compile_program

Guess: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden state [d] -> logits [K, V]; row k - 1 guesses the token k places behind the pending one."""

CHOICES: Final = ((0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0), (0, 2))
"""The first entries of Medusa's `mc_sim_7b_63`, in order of expected gain: on a CPU a few rows cost what one costs."""


class MedusaHeads(nn.Module):
    """K residual blocks on the hidden state. With zero weights every head guesses what the model put there itself."""

    def __init__(self, count: int, features: int) -> None:
        super().__init__()
        if count < 1 or features < 1:
            raise ValueError(f"{count} heads of {features} features; expected at least 1 of each")
        self.weight = nn.Parameter(torch.zeros(count, features, features))
        self.bias = nn.Parameter(torch.zeros(count, features))

    @property
    def count(self) -> int:
        """K."""
        return self.weight.shape[0]

    @property
    def features(self) -> int:
        """d."""
        return self.weight.shape[1]

    def state(self, number: int, hidden: Tensor) -> Tensor:
        """What head `number` (from 0) makes of hidden [..., d]: [..., d]."""
        return hidden + F.silu(F.linear(hidden, self.weight[number], self.bias[number]))

    def forward(self, hidden: Tensor) -> Tensor:
        """One position for all heads: [B, 1, d] -> [B, K, d]."""
        return torch.cat([self.state(number, hidden) for number in range(self.count)], dim=1)


def save_heads(heads: MedusaHeads, path: str | Path) -> None:
    """Write the heads as safetensors: `weight` [K, d, d] and `bias` [K, d], float32."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in heads.state_dict().items()}
    save_file(tensors, str(path), metadata={"kind": "medusa heads"})


def load_heads(path: str | Path) -> MedusaHeads:
    """Heads that `save_heads` wrote. Raises ModelFileError for a file of another kind."""
    expected = "safetensors with weight [K, d, d] and bias [K, d], as train_medusa_heads writes"
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ModelFileError(path, f"cannot be read ({error})", expected) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    weight = shapes.get("weight", ())
    if len(weight) != 3 or shapes != {"weight": (weight[0], weight[1], weight[1]), "bias": weight[:2]}:
        raise ModelFileError(path, f"holds {shapes}", expected)
    heads = MedusaHeads(weight[0], weight[1])
    heads.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return heads.eval()


class _HeadLogits(nn.Module):
    """Heads and output head as one module: hidden [1, 1, d] -> logits [1, K, V]."""

    def __init__(self, heads: MedusaHeads, head: Program) -> None:
        super().__init__()
        self.heads, self.head = heads, head.graph_module

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(self.heads(hidden))[0]
        return logits


def compile_guess(head: Program, heads: MedusaHeads, options: Options | None = None) -> Guess:
    """Heads and output head as one compiled program, which reads the output head's weight once for all heads.

    Raises ModelFileError for heads of another hidden size.
    """
    hidden = head.placeholders[0].meta["val"]
    if hidden.shape[-1] != heads.features:
        have = f"heads of {heads.features} features"
        raise ModelFileError("Medusa heads", have, f"{hidden.shape[-1]}, the hidden size of {head.name}")
    module = _HeadLogits(heads.to(hidden.dtype).eval(), head)
    example = torch.zeros(1, 1, heads.features, dtype=hidden.dtype)
    program = capture(module, (example,), dynamic=False)
    compiled = compile_program(program, options=options or Options(), example_inputs=(example,))

    def guess(state: Tensor) -> Tensor:
        (logits,) = compiled(state.to(hidden.dtype).reshape(1, 1, -1).contiguous())
        assert isinstance(logits, Tensor)
        return logits[0]

    return guess


class MedusaProposer:
    """Guesses of Medusa heads on `model`, as a tree of `choices`.

    guess: the heads, compiled (`compile_guess`) or any function of that form; heads without `guess` are compiled here.
    choices: paths of ranks, beginnings before what follows them; a proposal takes the first ones that the
    budget holds. Raises ValueError for choices that are no such tree.
    """

    name = "medusa"

    def __init__(
        self,
        model: HiddenModel,
        heads: MedusaHeads | Guess,
        *,
        choices: Sequence[Sequence[int]] = CHOICES,
        options: Options | None = None,
    ) -> None:
        check_choices(choices)
        self.model, self.choices = model, tuple(map(tuple, choices))
        if not isinstance(heads, MedusaHeads):
            self._guess = heads
        elif model.head is None:
            raise ValueError("the model has no output head to share with the Medusa heads")
        else:
            self._guess = compile_guess(model.head, heads, options)
            self.choices = tuple(choice for choice in self.choices if len(choice) <= heads.count)
        self._hidden: Tensor | None = None

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Any beginning of the choices is a tree."""
        return tuple(range(1, len(self.choices) + 1))

    def start(self, prompt: Sequence[int], warp: Warp, chance: Chance) -> None:
        """The prompt's last row gave the pending token; guesses are the heads' best, not drawn."""
        self._hidden = self.model.hidden[0, -1].clone()

    def propose(self, context: Sequence[int], budget: Budget) -> Proposal:
        """The heads' best tokens on the choices that the budget holds."""
        if self._hidden is None:
            raise DecodingError("Medusa was asked for guesses before start(prompt, ...)")
        choices = [choice for choice in self.choices if len(choice) <= budget.depth][: budget.rows]
        if not choices:
            return Proposal()
        return fill_tree(choices, self._guess(self._hidden))

    def observe(self, outcome: Outcome) -> None:
        """Keep the hidden state of the row that gave the new pending token."""
        self._hidden = self.model.hidden[0, outcome.row].clone()


def check_choices(choices: Sequence[Sequence[int]]) -> None:
    """ValueError unless every choice is new, and its beginning stands before it."""
    seen: set[tuple[int, ...]] = {()}
    for choice in map(tuple, choices):
        if choice in seen or choice[:-1] not in seen or min(choice) < 0:
            raise ValueError(f"choice {choice}: expected new ranks of at least 0, behind {choice[:-1]}")
        seen.add(choice)
    if len(seen) == 1:
        raise ValueError("there are no choices; expected one path at least")


def fill_tree(choices: Sequence[Sequence[int]], logits: Tensor) -> Proposal:
    """The tree of `choices` with the tokens that logits [K, V] rank there. Choices deeper than K, or of ranks beyond
    V, are left out with all behind them."""
    most = min(logits.shape[-1], 1 + max(max(choice) for choice in choices))
    best = [likeliest(row, most) for row in as_array(logits)]
    tree = Tree()
    nodes: dict[tuple[int, ...], int] = {(): ROOT}
    for choice in map(tuple, choices):
        depth, rank = len(choice), choice[-1]
        if depth <= len(best) and rank < most and choice[:-1] in nodes:
            nodes[choice] = tree.grow(nodes[choice[:-1]], best[depth - 1][rank])
    return Proposal(tree.tokens, parents=tree.parents)
