"""`weightctl advise`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightctl import units
from weightctl.cli import options, ui
from weightctl.config import Config

if TYPE_CHECKING:
    from weightctl.benchmark.advice import Option, Turn
    from weightctl.operations.advise import AdviseResult

BOUNDS = {
    "registry": "the registry's bandwidth", "volume": "the volume's bandwidth", "disk": "the local disk",
    "processor": "too few cores", "unpacking": "one core, which unpacks layer after layer",
    "loading": "the loader", "start": "Python, its imports and the device", "serializing": "the serializer",
}  # fmt: skip
VARIABLES = {"registry": "the registry's bandwidth", "volume": "the volume's bandwidth", "cores": "the number of cores"}
FIGURES = {
    "read": "local disk, read", "write": "local disk, written", "sha256": "SHA-256, one core",
    "unpack": "unpacking, one core", "load": "load, cached", "load_cold": "load, from disk",
    "start": "start of a process", "file": "serialized, cached", "file_cold": "serialized, from disk",
    "serialize": "serializing",
}  # fmt: skip


def advise(
    model: options.Model,
    bandwidth_registry: Annotated[
        str | None,
        typer.Option(
            metavar="B", help="What one replica gets from the registry: 500MB, 1.5GiB, 10Gbit.", show_default=False
        ),
    ] = None,
    bandwidth_volume: Annotated[
        str | None,
        typer.Option(
            metavar="B", help="What one replica gets from the volume [default: as the local disk].", show_default=False
        ),
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Cores of a replica [default: this machine's].", show_default=False),
    ] = None,
    updates_per_month: Annotated[int, typer.Option(metavar="N", min=0, help="New versions of the model.")] = 1,
    replicas: Annotated[int, typer.Option(metavar="N", min=1, help="Machines that load it.")] = 1,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A bench's --output, instead of measuring this machine.", show_default=False),
    ] = None,
    device: options.Device = None,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Say how to ship a model.

    Expected cold start, deployment, storage and transfer: container, volume or serialized. Downloads nothing.
    """
    from weightctl.operations.advise import advise as run

    registry = options.bandwidth(bandwidth_registry) if bandwidth_registry else None
    volume = options.bandwidth(bandwidth_volume) if bandwidth_volume else None
    config = Config.load({"device": device, "workers": workers, "cache_dir": cache_dir})
    with ui.progress() as progress:
        result = run(
            model, registry=registry, volume=volume, cores=cores, updates=updates_per_month, replicas=replicas,
            bench=bench, revision=revision, include=include or (), exclude=exclude or (), config=config,
            progress=progress,
        )  # fmt: skip
    if json:
        ui.show_json(result)
    else:
        _show(result)


def _show(result: AdviseResult) -> None:
    given = result.circumstances
    registry, volume = given.registry_bytes_per_second, given.volume_bytes_per_second
    about = (
        units.count(given.cores, "core"), f"{units.size(given.memory_bytes)} of memory", f"to {given.device}",
        f"registry {units.rate(registry)}" if registry else "registry not given: taken as never the limit",
        f"volume {units.rate(volume)}" if volume else "volume as the local disk",
    )  # fmt: skip
    ui.show_folded(
        f"{result.model}: {units.size(result.bytes)}, {units.count(result.layers, 'layer')}", ", ".join(about)
    )
    columns = ("", "cold start", "pull", "start", "load", "deploy", "storage", "transfer")
    ui.show_table(columns, [_cells(option, result) for option in result.options])
    month = units.count(given.updates_per_month, "update")
    ui.show_folded(f"transfer: {month} a month, to {units.count(given.replicas, 'replica')}", "")
    ui.show_folded(*_reasons(result), "", *_changes(result), "", *_origins(result))


def _origins(result: AdviseResult) -> Iterator[str]:
    for origin, words in (("measured", "measured here"), ("bench", "from the bench")):
        figures = [f"{FIGURES[f.name]} {_figure(f.name, f.value)}" for f in result.figures if f.origin == origin]
        if figures:
            yield f"{words}: {'; '.join(figures)}"


def _figure(name: str, value: float) -> str:
    return units.seconds(value) if name == "start" else units.rate(value)


def _least(result: AdviseResult) -> bool:
    """Whether a pull takes longer than it is said to, since no engine was measured."""
    return any(figure.name == "unpack" and figure.origin == "measured" for figure in result.figures)


def _cells(option: Option, result: AdviseResult) -> tuple[str, ...]:
    least = "≥ " if option.name == "container" and _least(result) else ""
    parts = {part.name: units.seconds(part.seconds) for part in option.start}
    return (
        f"{option.name}{' ←' if option.name == result.recommendation else ''}",
        least + units.seconds(option.start_seconds),
        *(parts.get(name, "") for name in ("pull", "start", "load")),
        units.seconds(option.deploy_seconds),
        units.size(option.storage_bytes),
        units.size(option.transfer_bytes),
    )


def _reasons(result: AdviseResult) -> list[str]:
    """Why the one that is recommended is, and what holds the others back."""
    from weightctl.benchmark.advice import CLOSE

    best = next(option for option in result.options if option.name == result.recommendation)
    quickest = min(result.options, key=lambda option: option.start_seconds)
    lines = [f"recommended: {best.name}"]
    if best is quickest:
        lines.append(f"  It starts soonest: {units.seconds(best.start_seconds)}.")
    else:
        lines.append(
            f"  It starts within {units.share(CLOSE)} of the soonest ({quickest.name}), and deploys in "
            f"{units.seconds(best.deploy_seconds)} instead of {units.seconds(quickest.deploy_seconds)}."
        )
    if _least(result):
        lines.append(
            "  No engine was measured: the container's pull is the least that it can take. To measure one: "
            "weightctl bench MODEL --scenario image --scenario volume --scenario model --registry HOST/NAME "
            "--output FILE, then advise --bench FILE"
        )
    for option in result.options:
        longest = max(option.start, key=lambda part: part.seconds)
        what = f"most of it {longest.name} ({units.seconds(longest.seconds)}): {BOUNDS[longest.bound]}"
        ratio = "" if option is best else f", {option.start_seconds / best.start_seconds:.1f}× as long"
        lines.append(f"  {option.name}: {units.seconds(option.start_seconds)}{ratio}, {what}")
    if result.bytes > 1.2 * result.loaded_bytes:
        spare = units.size(result.bytes - result.loaded_bytes)
        lines.append(f"  {spare} of the files are not loaded: leave them out with --exclude or --include")
    return lines


def _changes(result: AdviseResult) -> list[str]:
    lines = ["what would change it:"] if result.turns else ["nothing would change it:"]
    lines += [f"  {_turn(turn)}" for turn in result.turns]
    steady = [words for name, words in VARIABLES.items() if name not in {turn.variable for turn in result.turns}]
    if steady:
        lines.append(f"  not {', nor '.join(steady)}")
    return lines


def _turn(turn: Turn) -> str:
    if turn.variable == "cores":
        return f"{turn.instead}, {turn.side} {turn.value:.0f} cores"
    return f"{turn.instead}, {turn.side} {units.size(turn.value)}/s of {VARIABLES[turn.variable]}"
