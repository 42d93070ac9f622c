"""Statistics are sums over what happened."""

from torchweld.decoding.statistics import Pass, PassLog


def test_sums_and_shares() -> None:
    log = PassLog("draft", 7, 0.5)
    log.passes += [
        Pass(rows=5, drafted=4, accepted=2, given=3, asked=True, proposal_seconds=0.25, seconds=1.0),
        Pass(rows=1, drafted=0, accepted=0, given=1, asked=True, proposal_seconds=0.25, seconds=0.5),
        Pass(rows=3, drafted=2, accepted=0, given=1, asked=True, proposal_seconds=0.0, seconds=1.0),
        Pass(rows=1, drafted=0, accepted=0, given=1, asked=False, proposal_seconds=0.0, seconds=1.0),
    ]
    got = log.freeze(7)
    assert (got.strategy, got.prompt_tokens, got.first_token_seconds) == ("draft", 7, 0.5)
    assert (got.passes, got.speculative_passes, got.rows) == (4, 2, 10)
    assert (got.drafted, got.accepted, got.accepted_lengths) == (6, 2, (1, 0, 1))
    assert (got.decode_seconds, got.proposal_seconds) == (4.0, 0.5)
    assert (got.tokens_per_second, got.tokens_per_pass) == (1.5, 1.5)
    assert (got.mean_accepted, got.acceptance_rate) == (1.0, 2 / 6)


def test_nothing_happened() -> None:
    got = PassLog().freeze(0)
    assert (got.tokens_per_second, got.mean_accepted, got.acceptance_rate, got.tokens_per_pass) == (
        0,
        0,
        0,
        0,
    )
    assert got.accepted_lengths == ()
