"""What `--decode` names: a model to decode with, and a source of guesses for it.

    name        guesses from
    plain       nothing: one token per pass
    lookup      the prompt and the text so far (and texts that the user gives)
    lookahead   the model itself, on n-grams that it keeps computing beside the text
    draft       a smaller model with the same vocabulary; without one, the model's own with layers left out
    medusa      trained heads on the model's hidden states
    auto        lookup, given up where it does not pay

Whatever it is, the text is that of plain decoding; all but lookup give no pass more guesses than pay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from torchweld.decoding.cached import CachedModel
from torchweld.decoding.draft_model import DraftModel
from torchweld.decoding.generate import Schedule
from torchweld.decoding.hidden_model import HiddenModel
from torchweld.decoding.lookahead import LookaheadProposer
from torchweld.decoding.lookup import LookupProposer
from torchweld.decoding.medusa import MedusaHeads, MedusaProposer
from torchweld.decoding.reference import ReferenceProposer
from torchweld.decoding.self_draft import self_draft
from torchweld.decoding.step_model import DecodingError, Proposer, StepModel
from torchweld.decoding.step_source import StepSource
from torchweld.graph.program import Program
from torchweld.models.tokenizer import Tokenizer
from torchweld.optimizer.compile import Options

STRATEGIES: Final = ("auto", "plain", "draft", "lookup", "lookahead", "medusa")
GUESSES: Final[Mapping[str, int]] = {"draft": 4, "lookup": 7}
"""Guesses at most per pass, where that is not the usual number: a draft pays for every one of them; lookup always makes
as many, and with the pending token they fill whole tiles of the kernels: 9 rows cost a step more than 8."""
SCHEDULES: Final[Mapping[str, Schedule]] = {"lookup": "constant"}
"""How many guesses a pass gets, where that is not decided by what pays: whoever says lookup wants every guess tried."""


@dataclass(frozen=True)
class Draft:
    """A model that guesses, and its tokenizer."""

    model: StepModel
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Sources:
    """What the user gave to guess from. references: texts. heads: trained for the model (decoding/medusa.py)."""

    references: tuple[str, ...] = ()
    draft: Draft | None = None
    heads: MedusaHeads | None = None


def check_sources(name: str, references: Sequence[object], draft: object, heads: object) -> None:
    """DecodingError for something given that the strategy has no use for, and for something that it lacks."""
    if references and name not in ("auto", "lookup"):
        raise DecodingError(f"--reference is for --decode auto or lookup; got --decode {name}")
    if draft is not None and name != "draft":
        raise DecodingError(f"--draft is for --decode draft; got --decode {name}")
    if heads is not None and name != "medusa":
        raise DecodingError(f"--heads is for --decode medusa; got --decode {name}")
    if heads is None and name == "medusa":
        raise DecodingError(
            "--decode medusa needs --heads FILE: heads are trained for one model, by examples/train_medusa_heads.py"
        )


def build_model(
    name: str, program: Program | StepSource, options: Options, max_length: int | None = None
) -> CachedModel | HiddenModel:
    """The model that a strategy decodes with, from a captured program, or a source with these options.

    Raises NotDecodable.
    """
    if name == "medusa":
        return HiddenModel.from_program(_graph(program), options=options, max_length=max_length)
    return CachedModel(program, options=options, max_length=max_length)


def _graph(program: Program | StepSource) -> Program:
    """The captured program; some strategies cut their own out of it."""
    return program.program if isinstance(program, StepSource) else program


def build_proposer(
    name: str,
    model: StepModel,
    program: Program | StepSource,
    tokenizer: Tokenizer,
    sources: Sources,
    options: Options,
    sample: Sequence[int],
) -> Proposer | None:
    """The source of guesses of a strategy; None for plain decoding.

    program: what `model` was built from. sample: tokens of a text (the prompt, say) that tell a draft which layers
    matter least. Raises DecodingError for a source that cannot be had.
    """
    if name == "plain":
        return None
    if name == "lookahead":
        return LookaheadProposer()
    if name == "medusa":
        assert isinstance(model, HiddenModel) and sources.heads is not None, "check_sources comes first"
        return MedusaProposer(model, sources.heads, options=options)
    if name == "draft":
        if sources.draft is None:
            ids = torch.tensor([list(sample)])
            return self_draft(_graph(program), ids, options=options, max_length=model.max_length)
        return DraftModel.checked(sources.draft.model, model.vocab_size, tokenizer, sources.draft.tokenizer)
    if name not in ("auto", "lookup"):
        raise DecodingError(f"no strategy {name!r}; expected one of {', '.join(STRATEGIES)}")
    return build_lookup(tokenizer, sources.references)


def build_lookup(tokenizer: Tokenizer, references: Sequence[str] = ()) -> Proposer:
    """Guesses from the text, and from reference texts where there are any."""
    texts = [ids for text in references if len(ids := tokenizer.encode(text)) > 1]
    return ReferenceProposer(texts) if texts else LookupProposer()
