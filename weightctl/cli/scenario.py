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
    typer.Option(metavar="N", min=1, help="Layers fetched at once (repeatable).", show_default=False),
]
Registry = Annotated[
    str | None,
    typer.Option(
        metavar="HOST/NAME", help="Pull the image from there [default: from a local layout].", show_default=False
    ),
]
Volume = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The volume [default: the local disk].", show_default=False)
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
    about = f"{model.name}: {units.size(model.bytes)}, {model.format}, to {result.settings.device}"
    ui.show(f"{about}, cold starts: {result.settings.runs}")
    if rows:
        columns = shutil.get_terminal_size().columns
        scale = (WIDE_BAR if columns >= WIDE else NARROW_BAR) / max(row.median_seconds or 0.0 for row in rows)
        best = min(rows, key=lambda row: row.median_seconds or 0.0)
        names = ("scenario", "way", "jobs", "fetch", "unpack", "start", "load", "all", "")
        ui.show_table(names, [_cells(row, row is best, scale) for row in rows])
        key = {name: STAGES[name] for row in rows for name in (stage.name for stage in row.stages)}
        ui.show(
            ", ".join(f"{mark} {'/'.join(n for n in key if key[n] == mark)}" for mark in dict.fromkeys(key.values()))
        )
        for line in dict.fromkeys(_deployed(row) for row in rows if row.deploy):
            ui.show(line)
    for row in result.scenarios:
        if row.status != "ok":
            ui.show(ui.printable(f"{row.scenario}, {row.way} {row.status}: {row.reason}"))
    if not result.complete:
        ui.show("it did not come to its end")


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
        bar += STAGES.get(stage.name, "█") * (round(so_far * scale) - len(bar))
    return bar


def _deployed(row: Scenario) -> str:
    stages = (f"{stage.name} {units.size(stage.bytes)} in {units.seconds(stage.seconds)}" for stage in row.deploy)
    return f"deployed before, {row.scenario}: {', '.join(stages)}"
