"""What times amount to."""

from __future__ import annotations

import statistics

from hypothesis import given
from hypothesis import strategies as st

from weightctl.benchmark.statistics import Run, ceiling, summarize, unavailable

TIMES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20)


@given(TIMES, st.integers(1, 1 << 50))
def test_a_row_keeps_every_time(times: list[float], nbytes: int) -> None:
    runs = [Run("ok", None, seconds, 100 + turn, turn) for turn, seconds in enumerate(times)]
    row = summarize("safetensors", "warm", runs, nbytes)
    assert row.seconds == tuple(times)
    assert row.median_seconds == statistics.median(times)
    assert row.bytes_per_second == nbytes / statistics.median(times)
    assert (row.status, row.verified) == ("ok", True)
    assert (row.peak_host_bytes, row.peak_device_bytes) == (99 + len(times), len(times) - 1)


@given(TIMES, st.integers(0, 20))
def test_one_failed_run_fails_the_row(times: list[float], place: int) -> None:
    runs = [Run("ok", None, seconds, 1, 1) for seconds in times]
    runs.insert(place, Run("failed", "it crashed"))
    row = summarize("safetensors", "warm", runs, 100)
    assert (row.status, row.reason, row.seconds, row.median_seconds) == ("failed", "it crashed", (), None)
    assert (row.bytes_per_second, row.verified) == (None, False)


def test_an_unavailable_row_says_why() -> None:
    row = unavailable("tensorizer", "cold", "not installed")
    assert (row.status, row.reason, row.verified) == ("unavailable", "not installed", False)


def test_the_ceiling_is_the_slower_part() -> None:
    ceilings = {"warm_read": 30.0, "cold_read": 1.0, "host_to_device": 20.0}
    assert ceiling(ceilings, "warm") == 20.0
    assert ceiling(ceilings, "cold") == 1.0
    assert ceiling({"warm_read": 30.0}, "warm") == 30.0
    assert ceiling({"warm_read": 30.0}, "cold") is None
