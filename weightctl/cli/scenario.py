"""What `weightctl bench --scenario` shows: each way of shipping, stage by stage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightctl import units
from weightctl.cli import ui
from weightctl.config import Config
from weightctl.errors import UsageError

if TYPE_CHECKING:
    from weightctl.benchmark.results import BenchResult, Scenario, Stage
    from weightctl.operations.scenario import Shipping

NARROW_BAR, WIDE_BAR, WIDE = 8, 32, 110
"""Characters for the longest start, and columns from which there is room for the longer bar."""

STAGES = {"pull": "█", "unpack": "▓", "copy": "█", "start": "░", "load": "▒"}

Scenarios = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND", help="Time whole cold starts: image, volume, file or model (repeatable).", show_default=False
    ),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Pull with docker, containerd, podman or umoci [default: all there].", show_default=False
    ),
]
Jobs = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N", min=1, help="Layers fetched at once (repeatable) [default: the engine's].", show_default=False
    ),
]
Registry = Annotated[
    str | None,
    typer.Option(
        metavar="HOST/NAME", help="Push the image there, and pull it [default: a local layout].", show_default=False
    ),
]
Volume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the volume is mounted [default: the local disk].", show_default=False),
]


def shipping(
    kinds: Sequence[str],
    engines: Sequence[str] | None,
    jobs: Sequence[int] | None,
    registry: str | None,
    volume: Path | None,
    scratch: Path | None,
    strategies: Sequence[str] | None,
) -> Shipping:
    """What the options ask for. Raises UsageError for more than one strategy."""
    from weightctl.operations.scenario import Shipping

    strategy, *more = strategies or ["auto"]
    if more:
        raise UsageError("a cold start ends in one load", "give one --strategy, or none")
    return Shipping(
        tuple(kinds), tuple(engines or ()), tuple(jobs or ()), registry, volume, scratch, strategy
    )  # fmt: skip


def measure(model: str, shipping: Shipping, wanted: Mapping[str, Any], config: Config) -> BenchResult:
    """Run the scenarios."""
    from weightctl.operations.scenario import run_scenarios

    with ui.progress() as progress:
        return run_scenarios(model, shipping, **wanted, config=config, progress=progress)


def show(result: BenchResult) -> None:
    """A table of the ways that ran, and a line for each that did not."""
    rows = [row for row in result.scenarios if row.status == "ok"]
    model = result.model
    about = f"{model.name}: {units.size(model.bytes)}, {model.format}, to {result.device}"
    ui.show_folded(f"{about}, {units.count(result.settings.runs, 'cold start')}")
    if rows:
        columns = shutil.get_terminal_size().columns
        longest = max(sum(stage.seconds for stage in row.stages) for row in rows)
        scale = (WIDE_BAR if columns >= WIDE else NARROW_BAR) / (longest or 1)
        best = min(rows, key=lambda row: row.median_seconds or 0.0)
        names = ("scenario", "way", "jobs", "fetch", "unpack", "start", "load", "all", "")
        ui.show_table(names, [_cells(row, row is best, scale) for row in rows])
        key: dict[str, dict[str, None]] = {}
        for stage in (stage for row in rows for stage in row.stages):
            key.setdefault(_mark(stage), {})[stage.name] = None
        ui.show_folded(", ".join(f"{mark} {'/'.join(names)}" for mark, names in key.items()))
        ui.show_folded(*dict.fromkeys(_deployed(row) for row in rows if row.deploy))
    ui.show_folded(*(f"{r.scenario}, {r.way} {r.status}: {r.reason}" for r in result.scenarios if r.status != "ok"))
    if not result.complete:
        ui.show_folded("it did not come to its end")


def _cells(row: Scenario, best: bool, scale: float) -> tuple[str, ...]:
    found = {stage.name: stage for stage in row.stages}
    fetch = found.get("pull") or found.get("copy")
    times = [_time(fetch), *(_time(found.get(name)) for name in ("unpack", "start", "load"))]
    everything = units.seconds(row.median_seconds or 0.0)
    jobs = str(row.jobs) if row.jobs else ""
    return (row.scenario, row.way, jobs, *times, everything + (" ←" if best else ""), _bar(row.stages, scale))


def _time(stage: Stage | None) -> str:
    return units.seconds(stage.seconds) if stage else ""


def _bar(stages: Sequence[Stage], scale: float) -> str:
    """Every stage as long as it took; each ends where the sum up to it does."""
    bar, so_far = "", 0.0
    for stage in stages:
        so_far += stage.seconds
        bar += _mark(stage) * (round(so_far * scale) - len(bar))
    return bar


def _mark(stage: Stage) -> str:
    return STAGES.get(stage.name, "█")


def _deployed(row: Scenario) -> str:
    stages = (f"{stage.name} {units.size(stage.bytes)} in {units.seconds(stage.seconds)}" for stage in row.deploy)
    return f"deployed before, {row.scenario}: {', '.join(stages)}"
