"""Reads of a buffer by pinned threads."""

import os

import pytest

from benchmarks.pure_read import PureRead


@pytest.mark.parametrize("threads", [1, 2])
def test_passes_take_the_time_of_a_read(threads: int) -> None:
    nbytes = 24 << 20
    with PureRead(nbytes, threads) as read:
        seconds = read.passes(5)
    assert len(seconds) == 5
    # Between 10 MB/s and 10 TB/s: really read, in seconds.
    assert all(nbytes / 1e13 < each < nbytes / 1e7 for each in seconds)


def test_the_caller_keeps_its_cpus() -> None:
    before = os.sched_getaffinity(0)
    with PureRead(1000, 2) as read:
        assert len(read.passes(1)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("nbytes", "threads"), [(0, 1), (10, 0)])
def test_nothing_to_read_is_refused(nbytes: int, threads: int) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        PureRead(nbytes, threads)
