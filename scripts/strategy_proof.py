"""The proof that a strategy gives plain greedy decoding's text, bit for bit in logits: one real model, any prompts.

    subject = Subject("gemma3")
    for case in cases(subject, texts, tokens=256):      a prompt and the layout of the cache
        plain = subject.plain(case)
        for name in STRATEGIES: prove(subject, name, case, plain)

Every row of logits that belongs to the plain text is compared, those of the pass behind the last token too: so the
cache is what it should be when a strategy is done. Raises NotEqual at the first difference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from scripts.planted_trees import PlantedTrees
from scripts.watched_model import BitsDiffer, Text, WatchedModel
from torchweld.decoding.cache import SPARE_ROWS
from torchweld.decoding.cached import CachedModel, normalised
from torchweld.decoding.draft_model import DraftModel
from torchweld.decoding.generate import generate, generate_batch
from torchweld.decoding.generation import Generation
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.lookahead import LookaheadProposer
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.medusa import MedusaHeads, MedusaProposer, compile_guess
from torchweld.decoding.pass_costs import PassCosts
from torchweld.decoding.reference import ReferenceProposer
from torchweld.decoding.self_draft import draft_program
from torchweld.decoding.step_model import Proposer, StepModel
from torchweld.graph.capture import capture
from torchweld.graph.rewrite import Refusal
from torchweld.models.load import load_model
from torchweld.passes.expose_hidden import expose_hidden

PROMPTS: Final = Path(__file__).parent.parent / "tests" / "decoding" / "prompts.txt"
STRATEGIES: Final = ("lookup", "auto", "reference", "lookahead", "draft", "medusa", "trees")
CHOICES: Final = ((0,), (1,), (0, 0), (1, 0))
"""Of Medusa's tree; its heads are not trained."""
COSTS: Final = PassCosts((1, 2, 5, 9, 17), (0.010, 0.011, 0.013, 0.016, 0.022))
"""What the controller is told, so that it does the same thing in every run."""
MAX_LENGTH: Final = 1024


class NotEqual(Exception):
    """A strategy gave another text or other bits; the message says where and how far off."""


@dataclass(frozen=True)
class Layout:
    """How the cache lies in memory. spare: rows that rings keep beyond their window; None: there are no rings.

    turns: the text goes around the ring, since the prompt stands behind so much other text that it nearly fills it.
    """

    name: str
    spare: int | None = None
    up_front: bool = False
    turns: bool = False

    @property
    def rows(self) -> int:
        """Guesses at most in one pass that can be rolled back."""
        return SPARE_ROWS if self.spare is None else self.spare


FULL: Final = (Layout("grows"), Layout("up front", up_front=True))
RINGS: Final = (
    Layout("grows", SPARE_ROWS),
    Layout("up front", SPARE_ROWS, up_front=True),
    Layout("ring turns", SPARE_ROWS, turns=True),
    Layout("ring + 5 turns", 5, turns=True),
    Layout("ring + 40 turns", 40, up_front=True, turns=True),
)


@dataclass(frozen=True)
class Case:
    """A prompt, how many tokens to put behind it, and the layout of the cache in which strategies do so."""

    kind: str
    prompt: Text
    tokens: int
    layout: Layout


@dataclass(frozen=True)
class Proved:
    """One strategy on one case. compared: rows of logits that were the same bits."""

    strategy: str
    layout: str
    tokens: int
    passes: int
    drafted: int
    accepted: int
    compared: int
    seconds: float


def read_prompts(path: Path = PROMPTS) -> list[tuple[str, str]]:
    """(kind, text) of every block of the file; a line "=== kind" begins one."""
    blocks = path.read_text("utf-8").split("=== ")[1:]
    return [(kind, text.rstrip("\n")) for kind, text in (block.split("\n", 1) for block in blocks)]


class Subject:
    """A model with real weights, and all that is compiled of it: the step, a draft, Medusa heads."""

    def __init__(self, name: str) -> None:
        self.name = name
        loaded = load_model(name)
        assert loaded.tokenizer is not None
        self.tokenizer = loaded.tokenizer
        self.program = capture(loaded.module, loaded.example_inputs, verify=False)
        self.model = CachedModel(self.program)
        self.known: dict[Text, bytes] = {}
        self.texts: dict[Text, Text] = {}

    @cached_property
    def window(self) -> int:
        """The largest window of its layers; 0 where every layer sees everything."""
        return max(state.window if state.kind == "window" else 0 for state in self.model.states)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Those that the cache can have."""
        return RINGS if self.window else FULL

    @cached_property
    def draft(self) -> DraftModel:
        """Half of the layers; it guesses on however unsure it is."""
        ids = torch.tensor(
            [self.tokenizer.encode("The river rises in the hills and flows through three towns.")]
        )
        return DraftModel(CachedModel(draft_program(self.program, ids)), confidence=0.1)

    @cached_property
    def hidden(self) -> tuple[CachedModel, int, Any]:
        """The step with hidden states in its rows, how many features they have, and untrained heads on them."""
        exposed = expose_hidden(normalised(self.program))
        assert not isinstance(exposed, Refusal)
        heads = MedusaHeads(2, exposed.features)
        nn.init.normal_(heads.weight, std=1e-3, generator=torch.Generator().manual_seed(0))
        return CachedModel(exposed.program), exposed.features, compile_guess(exposed.head, heads)

    def plain(self, case: Case) -> Text:
        """The new tokens of plain decoding, one more than the case asks for; their logits are remembered."""
        if case.prompt not in self.texts:
            watched = WatchedModel(self.model, self.known, record=True)
            found = generate(watched, case.prompt, max_new_tokens=case.tokens + 1, eos_token_id=())
            self.texts[case.prompt] = found.tokens
        return self.texts[case.prompt]

    def strategy(self, name: str, case: Case, plain: Text) -> tuple[StepModel, Proposer]:
        """The model with a cache of the case's layout, and a source of guesses."""
        settings: dict[str, Any] = {"up_front": case.layout.up_front, "spare": case.layout.rows}
        if case.layout.up_front:
            settings["max_length"] = max(MAX_LENGTH, len(case.prompt) + case.tokens + 1)
        if name == "medusa":
            step, features, guess = self.hidden
            model = HiddenModel(step.with_cache(**settings), features)
            return model, MedusaProposer(model, guess, choices=CHOICES)
        text = (*case.prompt, *plain)
        middle = len(case.prompt) + case.tokens // 2
        proposers: dict[str, Proposer] = {
            "lookup": LookupProposer(),
            "auto": LookupProposer(),
            # With a word changed in the middle.
            "reference": ReferenceProposer([[*text[:middle], text[0], *text[middle + 1 :]]]),
            "lookahead": LookaheadProposer(),
            "trees": PlantedTrees(text, self.model.vocab_size, seed=len(text)),
        }
        proposer = self.draft if name == "draft" else proposers[name]
        return self.model.with_cache(**settings), proposer


def cases(
    subject: Subject, texts: Sequence[tuple[str, str]], tokens: int, *, every_layout: bool = False
) -> list[Case]:
    """A case per prompt, the layouts in turn; or per prompt and layout."""
    encoded = [subject.tokenizer.encode(text) for _, text in texts]
    found = []
    for number, (kind, _) in enumerate(texts):
        layouts = subject.layouts
        for layout in layouts if every_layout else [layouts[number % len(layouts)]]:
            prompt = encoded[number]
            if layout.turns:
                # The ring is full after a quarter of the new tokens.
                before = max(0, subject.window + layout.rows - tokens // 4 - len(prompt))
                others = [token for ids in encoded[number + 1 :] + encoded[: number + 1] for token in ids]
                others *= 1 + before // len(others)
                prompt = others[len(others) - before :] + prompt
            found.append(Case(kind, tuple(prompt), tokens, layout))
    return found


def prove(subject: Subject, name: str, case: Case, plain: Text) -> Proved:
    """Decode the case with the strategy `name` and compare. Raises NotEqual."""
    model, proposer = subject.strategy(name, case, plain)
    watched = WatchedModel(model, subject.known)
    begin = time.perf_counter()
    try:
        found = generate(
            watched,
            case.prompt,
            max_new_tokens=case.tokens,
            eos_token_id=(),
            proposer=proposer,
            num_assistant_tokens=min(case.layout.rows, 4 if name == "draft" else 10),
            num_assistant_tokens_schedule="adaptive" if name == "auto" else "constant",
            costs=COSTS,
        )
        _check_text(subject, name, case, plain, found)
        watched.step(torch.tensor([[found.tokens[-1]]]))
    except BitsDiffer as difference:
        raise NotEqual(f"{_where(subject, name, case)}: {_describe(subject, difference)}") from None
    seconds = time.perf_counter() - begin
    return _proved(name, case.layout.name, watched, [found], case.tokens + 1, seconds)


def prove_batch(subject: Subject, group: Sequence[Case]) -> Proved:
    """Decode cases of one layout and one number of tokens as one batch, and compare each with itself alone."""
    first = group[0]
    model, _ = subject.strategy("lookup", max(group, key=lambda case: len(case.prompt)), ())
    watched = WatchedModel(model, subject.known)
    plain = [subject.plain(case) for case in group]
    begin = time.perf_counter()
    prompts = [case.prompt for case in group]
    try:
        found = generate_batch(watched, prompts, max_new_tokens=first.tokens, eos_token_id=())
    except BitsDiffer as difference:
        raise NotEqual(f"{_where(subject, 'batch', first)}: {_describe(subject, difference)}") from None
    for case, expected, got in zip(group, plain, found, strict=True):
        _check_text(subject, "batch", case, expected, got)
    seconds = time.perf_counter() - begin
    return _proved("batch", first.layout.name, watched, found, first.tokens * len(group), seconds)


def _proved(
    name: str, layout: str, watched: WatchedModel, found: Sequence[Generation], rows: int, seconds: float
) -> Proved:
    """The numbers of a run; `rows` is how many rows of logits it must have compared at least."""
    assert watched.compared >= rows, f"{name}: {watched.compared} rows were compared; expected {rows}"
    statistics = found[0].statistics  # of the whole batch, where there is one
    return Proved(
        strategy=name,
        layout=layout,
        tokens=sum(len(one.tokens) for one in found),
        passes=statistics.passes,
        drafted=statistics.drafted,
        accepted=statistics.accepted,
        compared=watched.compared,
        seconds=seconds,
    )


def _where(subject: Subject, name: str, case: Case) -> str:
    return f"{subject.name}, {name}, prompt {case.kind!r} of {len(case.prompt)} tokens, cache: {case.layout.name}"


def _check_text(subject: Subject, name: str, case: Case, plain: Text, found: Generation) -> None:
    expected = plain[: case.tokens]
    if found.tokens == expected:
        return
    pairs = list(zip(found.tokens, expected, strict=False))
    place = next((i for i, (got, wanted) in enumerate(pairs) if got != wanted), len(pairs))
    raise NotEqual(
        f"{_where(subject, name, case)}: new token {place} is {found.tokens[place : place + 1]}, plain decoding gives "
        f"{expected[place : place + 1]} ({len(found.tokens)} and {len(expected)} tokens in all)"
    )


def _describe(subject: Subject, difference: BitsDiffer) -> str:
    """How far the logits are from those of one row at a time."""
    model = subject.model
    model.prefill([difference.text[:1]])
    for token in difference.text[1:]:
        expected = model.step(torch.tensor([[token]]))[0, 0]
    changed = (expected != difference.logits).sum().item()
    largest = (expected - difference.logits).abs().max().item()
    best = int(expected.argmax()), int(difference.logits.argmax())
    return (
        f"behind {len(difference.text)} tokens {changed} of {len(expected)} logits differ, by at most {largest:.3g}; "
        f"the best token is {best[1]}, plain decoding's is {best[0]}"
    )
