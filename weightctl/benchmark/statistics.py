"""What the times of a row amount to: pure functions over plain data."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """One load in a process of its own."""

    status: str
    """`ok` or `failed`."""
    reason: str | None = None
    """Why it failed."""
    seconds: float | None = None
    """From the call until every byte is on the device; only of a load that was right."""
    peak_host_bytes: int | None = None
    """The process's largest resident set, its libraries included."""
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One strategy with one state of the page cache."""

    strategy: str
    cache: str
    """`warm` or `cold`."""
    status: str
    """`ok`, `unavailable` or `failed`."""
    reason: str | None
    seconds: tuple[float, ...]
    """Every run."""
    median_seconds: float | None
    bytes_per_second: float | None
    """Of the model's tensors, at the median."""
    verified: bool
    """Whether every run loaded the model's own bytes."""
    peak_host_bytes: int | None
    peak_device_bytes: int | None


def unavailable(strategy: str, cache: str, reason: str) -> Row:
    """The row of a strategy that cannot run here, or cannot load this model."""
    return Row(strategy, cache, "unavailable", reason, (), None, None, False, None, None)


def summarize(strategy: str, cache: str, runs: Sequence[Run], nbytes: int) -> Row:
    """The row of at least one run over `nbytes` of tensors. One failed run makes it a failed row, without times."""
    failed = next((run for run in runs if run.status != "ok"), None)
    seconds = () if failed else tuple(run.seconds for run in runs if run.seconds is not None)
    median = statistics.median(seconds) if seconds else None
    return Row(
        strategy=strategy,
        cache=cache,
        status="failed" if failed else "ok",
        reason=failed.reason if failed else None,
        seconds=seconds,
        median_seconds=median,
        bytes_per_second=nbytes / median if median else None,
        verified=failed is None,
        peak_host_bytes=_largest(run.peak_host_bytes for run in runs),
        peak_device_bytes=_largest(run.peak_device_bytes for run in runs),
    )


def ceiling(ceilings: Mapping[str, float], cache: str) -> float | None:
    """Bytes a second that no load of this kind passes: the slower of reading the files and copying to the device."""
    limits = [ceilings.get(f"{cache}_read"), ceilings.get("host_to_device")]
    return min((limit for limit in limits if limit), default=None)


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
