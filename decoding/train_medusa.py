"""Train Medusa heads on what the model itself says: its greedy text and the hidden states behind it.

    traces = record(model, prompts, tokens=64)              # the model's own text
    heads, fits = train_heads(traces, model.head, count=3)  # only the heads learn
    print(fits[0].accuracy)                                 # of held-out tokens two places ahead

Head k learns, from the state that gave token i, to give token i + k. The output head is the model's and stays fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.medusa import MedusaHeads
from torchweld.graph.program import Program, get_tensor


@dataclass(frozen=True)
class Trace:
    """Greedy text: hidden[i] float [T, d] is the state that gave tokens[i], int64 [T]."""

    hidden: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Fit:
    """How well a head guesses held-out tokens: share of right guesses, mean cross entropy in nats, tokens looked at."""

    accuracy: float
    loss: float
    tokens: int


def record(
    model: HiddenModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    eos: Collection[int] = (),
    batch: int = 8,
) -> list[Trace]:
    """Continue every prompt greedily by at most `tokens` tokens, `batch` prompts at a time; a trace ends before `eos`.

    What the model has cached is replaced.
    """
    traces = []
    for first in range(0, len(prompts), batch):
        logits = model.prefill(prompts[first : first + batch])[:, None]
        states, chosen = [model.hidden[:, 0].clone()], [logits[:, 0].argmax(-1)]
        for _ in range(tokens - 1):
            logits = model.step(chosen[-1][:, None])
            states.append(model.hidden[:, 0].clone())
            chosen.append(logits[:, 0].argmax(-1))
        hidden, said = torch.stack(states, dim=1), torch.stack(chosen, dim=1)
        traces += [_cut(Trace(h, t), eos) for h, t in zip(hidden, said, strict=True)]
    return traces


def _cut(trace: Trace, eos: Collection[int]) -> Trace:
    """The trace before its first end token."""
    ends = [place for place, token in enumerate(trace.tokens.tolist()) if token in eos]
    end = ends[0] if ends else len(trace.tokens)
    return Trace(trace.hidden[:end], trace.tokens[:end])


def train_heads(
    traces: Sequence[Trace],
    head: Program,
    *,
    count: int = 3,
    epochs: int = 4,
    rows: int = 256,
    rate: float = 1e-3,
    held_out: float = 0.1,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[MedusaHeads, tuple[Fit, ...]]:
    """Train `count` heads; returns them and how each does on the held-out share of the traces.

    epochs over all states, `rows` at a time, by Adam at `rate`, falling to zero as a cosine. on_step gets the number of
    each step and its loss. Equal arguments give equal heads. Raises ValueError where the traces are too short.
    """
    states, targets = _pairs(traces, count)
    kept = int(len(states) * (1 - held_out))
    if not 0 < kept < len(states):
        total = f"{len(states)} states with {count} tokens behind them"
        raise ValueError(f"{total}; expected enough to train on and to hold {held_out:.0%} back")
    logits_of = fixed_head(head)
    heads = MedusaHeads(count, states.shape[1])
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-kept // rows)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(kept, generator=generator).tolist()
        chosen, order = order[:rows], order[rows:]
        optimizer.zero_grad()
        loss = _descend(heads, logits_of, states[chosen], targets[chosen])
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss)
    heads.eval()
    return heads, measure_heads(heads, logits_of, states[kept:], targets[kept:], rows)


def _pairs(traces: Sequence[Trace], count: int) -> tuple[Tensor, Tensor]:
    """States [N, d] float32 and the tokens 1 .. count places behind what they gave, [N, count]."""
    states, targets = [], []
    for trace in traces:
        length = len(trace.tokens) - count
        if length > 0:
            states.append(trace.hidden[:length].float())
            targets.append(trace.tokens.unfold(0, count, 1)[1:])
    if not states:
        raise ValueError(f"no trace is longer than {count} tokens; record more tokens per prompt")
    return torch.cat(states), torch.cat(targets)


def _descend(
    heads: MedusaHeads, logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor
) -> float:
    """Add the gradients of the mean cross entropy, in which later heads count less, as in the paper (0.8 per place).

    Head by head: the logits of one over a large vocabulary are the most memory that training takes.
    """
    total = 0.0
    for number in range(heads.count):
        logits = logits_of(heads.state(number, states)[None])[0]
        loss = F.cross_entropy(logits, targets[:, number]) * 0.8**number
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


@torch.no_grad()
def measure_heads(
    heads: MedusaHeads, logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, rows: int
) -> tuple[Fit, ...]:
    """How every head does on states [N, d] and targets [N, K], `rows` at a time."""
    fits = []
    for number in range(heads.count):
        right, loss = 0, 0.0
        for start in range(0, len(states), rows):
            wanted = targets[start : start + rows, number]
            logits = logits_of(heads.state(number, states[start : start + rows])[None])[0]
            right += int((logits.argmax(-1) == wanted).sum())
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        fits.append(Fit(right / len(states), loss / len(states), len(states)))
    return tuple(fits)


def fixed_head(head: Program) -> Callable[[Tensor], Tensor]:
    """The output head as a function that gradients pass through; what it stores is decoded once, here."""
    module = head.graph_module
    constants: dict[fx.Node, Tensor] = {}
    moving: list[fx.Node] = []
    (start,) = head.placeholders
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants[node] = get_tensor(module, str(node.target)).detach()
        elif node.op == "call_function":
            if all(source in constants for source in node.all_input_nodes):
                constants[node] = _call(node, constants)
            else:
                moving.append(node)
    result = head.outputs[0]
    assert isinstance(result, fx.Node)
    dtype = start.meta["val"].dtype

    def logits_of(hidden: Tensor) -> Tensor:
        values = {**constants, start: hidden.to(dtype)}
        for node in moving:
            values[node] = _call(node, values)
        return values[result].float()

    return logits_of


def _call(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """The value of a call, with gradients where its arguments have them."""
    target = node.target
    assert callable(target)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    result: Tensor = target(*args, **kwargs)
    return result
