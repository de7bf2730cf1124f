"""Whole cold starts: the two stages that every one ends with, and what many starts amount to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from weightctl.benchmark.results import ColdStart, Interval, Run, Scenario, Stage
from weightctl.benchmark.statistics import median_interval
from weightctl.benchmark.summary import CONFIDENCE
from weightctl.errors import WeightctlError
from weightctl.loaders import weight_files
from weightctl.model import Snapshot

SCENARIOS = ("image", "volume", "file", "model")
"""Pulled by an engine and unpacked; from a volume; a serialized file; the model's own files as they lie there."""

Kind = Literal["image", "volume", "file", "model"]


def last_stages(run: Run, snapshot: Snapshot) -> tuple[Stage, Stage]:
    """Until the process that loads `snapshot` could begin, and until all is on the device.

    Raises WeightctlError if the run failed.
    """
    if run.seconds is None:
        raise WeightctlError(run.reason or "it failed")
    size = sum(file.size for file in weight_files(snapshot))
    start = sum(run.phases[name] for name in ("start", "imports", "device"))
    return Stage("start", 0, start), Stage("load", size, run.seconds)


def summarize(
    kind: Kind, way: str, jobs: int | None, strategy: str | None, deploy: Sequence[Stage], starts: Sequence[ColdStart]
) -> Scenario:
    """The row of at least one cold start. One that failed, or none that counts, makes it a failed row without times."""
    failed = next((start.reason for start in starts if start.status == "failed"), None)
    counted = [start for start in starts if start.mark is None]
    if failed is None and not counted:
        failed = starts[0].mark
    if failed is not None:
        return Scenario(kind, way, jobs, "failed", failed, strategy, tuple(deploy), starts=tuple(starts))
    seconds = tuple(start.seconds for start in counted)
    stages = [
        Stage(first.name, first.bytes, statistics.median(start.stages[place].seconds for start in counted))
        for place, first in enumerate(counted[0].stages)
    ]
    return Scenario(
        scenario=kind,
        way=way,
        jobs=jobs,
        status="ok",
        strategy=strategy,
        deploy=tuple(deploy),
        seconds=seconds,
        median_seconds=statistics.median(seconds),
        interval=Interval(*median_interval(seconds, CONFIDENCE)),
        stages=tuple(stages),
        starts=tuple(starts),
    )
