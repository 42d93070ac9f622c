"""Plain decoding: one token per pass and sequence, for one text or a batch of texts of different lengths.

    logits = model.prefill(prompts)                  [B, V]
    while any text goes on:                          (greedy: the head chooses, and gives no logits)
        token  = choose(logits)                      one per text
        logits = model.step(token)                   [B, 1, V]; a finished text is fed nothing

It is what every other strategy is measured by and compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchweld.decoding.chance import Chance
from torchweld.decoding.choices import Chooser, may_choose
from torchweld.decoding.logits import log_probability
from torchweld.decoding.request import (
    Finish,
    Given,
    Request,
    check_request,
    finish_of,
    roll_back,
)
from torchweld.decoding.statistics import Pass, PassLog
from torchweld.decoding.step_model import DecodingError, StepModel


def decode_plain(
    model: StepModel,
    requests: Sequence[Request],
    *,
    chance: Chance,
    log: PassLog,
    is_stopped: Callable[[int, int], bool] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Given]:
    """Yield the tokens behind every request's prompt, pass by pass, within a pass in the order of the requests.

    is_stopped: hears the number of the text and every token given out; True ends that text with "stop".

    The model starts over with the prompts. However the loop ends, the model then has cached every prompt and the
    tokens given out behind it but the last. A text's tokens do not depend on the others in the batch (sampled ones do:
    all draw from the same chance). Raises DecodingError for a bad request and for logits that hold NaN; the model's
    errors pass through.
    """
    if not requests:
        raise DecodingError("there are no prompts; give at least one")
    for number, request in enumerate(requests):
        check_request(request, model, "the prompt" if len(requests) == 1 else f"prompt {number}")
    return _Batch(model, requests, chance, log, is_stopped, clock).run()


@dataclass
class _Batch:
    """Texts on their way; `texts[b]` is prompt b and what was given out behind it."""

    model: StepModel
    requests: Sequence[Request]
    chance: Chance
    log: PassLog
    is_stopped: Callable[[int, int], bool] | None
    clock: Callable[[], float]

    def run(self) -> Iterator[Given]:
        """See `decode_plain`."""
        begin = self.clock()
        self.texts = [list(request.prompt) for request in self.requests]
        self.finished: dict[int, Finish] = {}
        logits = self.model.prefill([request.prompt for request in self.requests])
        try:
            alive = list(range(len(self.requests)))
            tokens = self._choose(alive, logits)
            self.log.strategy, self.log.prompt_tokens = "plain", sum(map(len, self.texts))
            self.log.prefill_seconds = self.clock() - begin
            yield from self._give(alive, tokens, logits)
            while alive := [number for number in alive if number not in self.finished]:
                begin = self.clock()
                tokens, read = self._next(alive)
                seconds = self.clock() - begin
                count = len(alive)
                self.log.passes.append(Pass(count, 0, 0, count, False, 0.0, seconds))
                yield from self._give(alive, tokens, read)
        finally:
            lengths = [max(len(r.prompt), len(t) - 1) for r, t in zip(self.requests, self.texts, strict=True)]
            roll_back(self.model, lengths)

    def _next(self, alive: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """The next token of every text that goes on, and where somebody reads them the logits [B, V] behind the last
        tokens, anything for texts that are finished."""
        ids = torch.tensor([[text[-1]] for text in self.texts])
        everything = len(alive) == len(self.texts)
        counts = None if everything else [int(number in alive) for number in range(len(self.texts))]
        model = self.model
        if isinstance(model, Chooser) and all(may_choose(model, r.warp, r.logprobs) for r in self.requests):
            choices = model.choose(ids, counts=counts)
            return [choices.token(number, 0, len(self.texts[number])) for number in alive], None
        logits = (model.step(ids) if counts is None else model.step(ids, counts=counts))[:, 0]
        return self._choose(alive, logits), logits

    def _choose(self, alive: Sequence[int], logits: Tensor) -> list[int]:
        """The next token of every text that goes on."""
        tokens = []
        for number in alive:
            warp, text, row = self.requests[number].warp, self.texts[number], logits[number]
            greedy = warp.is_greedy
            tokens.append(
                warp.choose(row, text) if greedy else self.chance.draw(warp.distribution(row, text))
            )
        return tokens

    def _give(self, alive: Sequence[int], tokens: Sequence[int], logits: Tensor | None) -> Iterator[Given]:
        for number, token in zip(alive, tokens, strict=True):
            logprob = None
            if logits is not None and self.requests[number].logprobs:
                logprob = log_probability(logits[number], token)
            self.texts[number].append(token)
            finish = self._finish(number, token)
            if finish is not None:
                self.finished[number] = finish
            yield Given(token, logprob, finish, number)

    def _finish(self, number: int, token: int) -> Finish | None:
        if self.is_stopped is not None and self.is_stopped(number, token):
            return "stop"
        return finish_of(token, len(self.texts[number]), self.requests[number], self.model.max_length)
