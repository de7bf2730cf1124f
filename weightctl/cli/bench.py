"""`weightctl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightctl.cli import options, ui
from weightctl.cli import scenario as ways
from weightctl.config import Config

if TYPE_CHECKING:
    from weightctl.benchmark.statistics import Row
    from weightctl.operations.bench import BenchResult


def bench(
    model: options.Model,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Time only these strategies (repeatable) [default: all].", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.", show_default=False)
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATE", help="Page cache: warm or cold (repeatable) [default: warm].", show_default=False
        ),
    ] = None,
    runs: Annotated[
        int | None, typer.Option(metavar="N", help="Measured runs of each row [default: 3].", show_default=False)
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            help="Load in N processes at once, each to a device of its own.",
            show_default=False,
        ),
    ] = 1,
    timeout: Annotated[
        int | None, typer.Option(metavar="S", help="Stop a run after S seconds [default: 600].", show_default=False)
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep converted models here [default: a temporary directory].", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the result as JSON after every run.", show_default=False)
    ] = None,
    scenario: ways.Scenarios = None,
    engine: ways.Engines = None,
    jobs: ways.Jobs = None,
    registry: ways.Registry = None,
    volume: ways.Volume = None,
    plain_http: options.PlainHttp = None,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> None:
    """Time every way to load a model.

    Each run is a fresh process, and every tensor is compared with the model's own bytes. Prints a table.
    """
    from weightctl.operations.bench import bench as run

    given = {"device": device, "runs": runs, "timeout": timeout, "workers": workers, "cache_dir": cache_dir}
    if scenario:
        shipping = ways.shipping(scenario, engine, jobs, registry, volume, scratch, strategy)
        wanted = {"revision": revision, "include": include or (), "exclude": exclude or (), "output": output}
        return ways.bench(model, shipping, wanted, Config.load({**given, "plain_http": plain_http}), json)
    with ui.progress() as progress:
        result = run(
            model, strategies=strategy or (), caches=cache or (), nproc=nproc, scratch=scratch, output=output,
            revision=revision, include=include or (), exclude=exclude or (), config=Config.load(given),
            progress=progress,
        )  # fmt: skip
    if json:
        ui.show_json(result)
    else:
        _show(result)
    if not any(row.status == "ok" for row in result.results):
        raise typer.Exit(1)
    return None


def _show(result: BenchResult) -> None:
    ui.show(_headline(result))
    columns = ("strategy", "cache", "median", "GB/s", "ceiling", "host", "device", "verified")
    ui.show_table(columns, [_cells(row, result.ceilings) for row in result.results if row.status != "unavailable"])
    for reason in dict.fromkeys(f"{r.strategy} {r.status}: {r.reason}" for r in result.results if r.status != "ok"):
        ui.show(reason)


def _headline(result: BenchResult) -> str:
    environment, model = result.environment, result.model
    rates = ", ".join(f"{name.replace('_', ' ')} {rate / 1e9:.2f} GB/s" for name, rate in result.ceilings.items())
    return (
        f"{model['name']}: {model['tensors']} tensors, {ui.size(model['bytes'])}, {model['format']}, "
        f"to {environment.get('gpu', environment['device'])}\nceilings: {rates}"
    )


def _cells(row: Row, ceilings: dict[str, float]) -> tuple[str, ...]:
    from weightctl.benchmark.statistics import ceiling

    if row.median_seconds is None or row.bytes_per_second is None:
        return (row.strategy, row.cache, row.status, "", "", "", "", "no")
    limit = ceiling(ceilings, row.cache)
    return (
        row.strategy,
        row.cache,
        ui.seconds(row.median_seconds),
        f"{row.bytes_per_second / 1e9:.2f}",
        f"{row.bytes_per_second / limit:.2f}×" if limit else "",
        ui.size(row.peak_host_bytes or 0),
        ui.size(row.peak_device_bytes) if row.peak_device_bytes else "",
        "yes" if row.verified else "no",
    )
