"""Plain decoding of one text and of batches: against the definition, by recomputation from the logits."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.decoding.toy_models import Markov, ToyModel, WholeText
from torchweld.decoding.autoregressive import decode_plain
from torchweld.decoding.chance import Dice
from torchweld.decoding.request import Request
from torchweld.decoding.statistics import PassLog
from torchweld.decoding.step_model import DecodingError, LogitsFor
from torchweld.decoding.warp import Warp


def by_definition(forward: Markov | WholeText, request: Request, limit: int | None) -> list[int]:
    """Greedy tokens from logits of the whole text."""
    text = list(request.prompt)
    while True:
        logits = forward(torch.tensor([text]))[0, -1]
        text.append(int(logits.argmax()))
        new = len(text) - len(request.prompt)
        if text[-1] in request.eos or new == request.max_new_tokens or (limit and len(text) > limit):
            return text[len(request.prompt) :]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_text_of_a_batch_is_the_text_alone(data: st.DataObject) -> None:
    vocab, seed = data.draw(st.integers(2, 8)), data.draw(st.integers(0, 50))
    forwards: list[Markov | WholeText] = [Markov(vocab, 2, seed), WholeText(vocab, seed)]
    forward = data.draw(st.sampled_from(forwards))
    limit = data.draw(st.sampled_from([None, 12]))
    token = st.integers(0, vocab - 1)
    requests = [
        Request(
            tuple(data.draw(st.lists(token, min_size=1, max_size=9))),
            data.draw(st.integers(1, 10)),
            frozenset(data.draw(st.lists(token, max_size=1))),
        )
        for _ in range(data.draw(st.integers(1, 4)))
    ]
    model = ToyModel(forward, limit)
    texts: list[list[int]] = [[] for _ in requests]
    ended = [False] * len(requests)
    for piece in decode_plain(model, requests, chance=Dice(0), log=PassLog()):
        assert not ended[piece.sequence]
        ended[piece.sequence] = piece.finish is not None
        texts[piece.sequence].append(piece.token)
    assert texts == [by_definition(forward, request, limit) for request in requests]
    assert all(ended)
    assert model.texts == [[*r.prompt, *text[:-1]] for r, text in zip(requests, texts, strict=True)]


def test_a_text_that_has_ended_is_fed_nothing() -> None:
    class Watched(ToyModel):
        counts: list[Sequence[int] | None]

        def step(
            self,
            ids: Tensor,
            *,
            counts: Sequence[int] | None = None,
            parents: Sequence[int] | None = None,
            logits_for: LogitsFor = "last",
        ) -> Tensor:
            self.counts.append(counts)
            return super().step(ids, counts=counts, parents=parents, logits_for=logits_for)

    model, log = Watched(WholeText(5)), PassLog()
    model.counts = []
    requests = [Request((1,), 2), Request((2, 3), 4), Request((4,), 1)]
    assert len(list(decode_plain(model, requests, chance=Dice(0), log=log))) == 7
    assert model.counts == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert [entry.rows for entry in log.passes] == [2, 1, 1]


def test_log_probabilities_are_the_models_own() -> None:
    forward = WholeText(6, 1)
    warp = Warp(do_sample=True, temperature=0.5, top_k=3)
    request = Request((1, 2), 8, warp=warp, logprobs=True)
    text = [1, 2]
    for piece in decode_plain(ToyModel(forward), [request], chance=Dice(3), log=PassLog()):
        expected = forward(torch.tensor([text]))[0, -1].double().log_softmax(0)[piece.token]
        assert piece.logprob == float(expected)
        text.append(piece.token)


def test_sampling_repeats_with_the_seed_and_only_then() -> None:
    def run(seed: int) -> list[int]:
        request = Request((1,), 30, warp=Warp(do_sample=True))
        model = ToyModel(WholeText(9, 2, spread=0.5))
        return [piece.token for piece in decode_plain(model, [request], chance=Dice(seed), log=PassLog())]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize("given_out", range(1, 8))
def test_a_batch_that_is_broken_off_keeps_what_was_given_out(given_out: int) -> None:
    model = ToyModel(WholeText(5, 4))
    requests = [Request((1, 2), 10), Request((3,), 10)]
    pieces = decode_plain(model, requests, chance=Dice(0), log=PassLog())
    texts: list[list[int]] = [[], []]
    for _ in range(given_out):
        piece = next(pieces)
        texts[piece.sequence].append(piece.token)
    pieces.close()  # type: ignore[attr-defined]
    assert model.texts == [[1, 2, *texts[0][:-1]], [3, *texts[1][:-1]]]


def test_nan_is_refused_and_the_cache_keeps_the_text() -> None:
    class Broken(WholeText):
        def __call__(self, ids: Tensor, /) -> Tensor:
            logits = super().__call__(ids)
            return logits * float("nan") if ids.shape[1] > 4 else logits

    model = ToyModel(Broken(5))
    tokens = []
    with pytest.raises(DecodingError, match="after 5 tokens hold NaN"):
        for piece in decode_plain(model, [Request((1, 2), 10)], chance=Dice(0), log=PassLog()):
            tokens.append(piece.token)
    assert model.texts == [[1, 2, *tokens[:-1]]]


def test_errors_name_the_prompt() -> None:
    model = ToyModel(Markov(5))
    with pytest.raises(DecodingError, match="there are no prompts"):
        decode_plain(model, [], chance=Dice(0), log=PassLog())
    with pytest.raises(DecodingError, match="prompt 1 has no tokens"):
        decode_plain(model, [Request((1,), 2), Request((), 2)], chance=Dice(0), log=PassLog())


def test_statistics_count_the_tokens_of_all_texts() -> None:
    log = PassLog()
    requests = [Request((1,), 4), Request((2, 3), 2)]
    given_out = list(decode_plain(ToyModel(WholeText(5)), requests, chance=Dice(0), log=log))
    statistics = log.freeze(len(given_out))
    assert (statistics.new_tokens, statistics.passes, statistics.rows) == (6, 3, 4)
    assert statistics.given_in_passes == 4, "each text's first token comes from its prompt"
