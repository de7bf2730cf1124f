"""`weightctl bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightctl.cli import bench_table, options, ui
from weightctl.cli import scenario as ways
from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="org/name[@revision], ./dir, /dir, file:///dir or volume:DIR#name[@version].",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Time only these strategies (repeatable) [default: all].", show_default=False
        ),
    ] = None,
    device: options.Device = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATE", help="Page cache: warm or cold (repeatable) [default: warm].", show_default=False
        ),
    ] = None,
    runs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Runs of each row, at most [default: 10; cold starts: 3].", show_default=False),
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="End when every median is known to this share of it, either side [default: 0.05].",
            show_default=False,
        ),
    ] = None,
    drop_caches: Annotated[
        bool, typer.Option("--drop-caches", help="Empty the whole page cache for a cold run; needs root.")
    ] = False,
    construct: Annotated[
        bool, typer.Option("--construct", help="Build the model after each load, and time that too.")
    ] = False,
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
    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Write a report: .html .svg .png .md .csv .json (repeatable).",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD.json", help="Say what has changed since.", show_default=False)
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FLOOR",
            help="Exit with 1 below this share of the limit, as 'pipelined>=0.7' (repeatable).",
            show_default=False,
        ),
    ] = None,
    saved: Annotated[
        Path | None,
        typer.Option("--from", metavar="RESULT.json", help="Show a saved result; measure nothing.", show_default=False),
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
    from weightctl.benchmark.reports import report_for, write_report
    from weightctl.benchmark.summary import Floor
    from weightctl.operations.bench import bench as run
    from weightctl.operations.bench import reopen

    for path in report or ():
        report_for(path)
    floors = [Floor.parse(text) for text in fail_below or ()]
    config = Config.load(
        {
            "device": device, "runs": runs, "precision": precision, "timeout": timeout, "workers": workers,
            "cache_dir": cache_dir, "plain_http": plain_http,
        }
    )  # fmt: skip
    wanted: dict[str, Any] = {
        "revision": revision,
        "include": include or (),
        "exclude": exclude or (),
        "output": output,
    }
    if saved is not None and model is None:
        result = reopen(saved, compare)
    elif model is None or saved is not None:
        raise UsageError("bench needs a MODEL, or --from with a saved result, and not both", "weightctl bench --help")
    elif scenario:
        shipping = ways.shipping(scenario, engine, jobs, registry, volume, scratch, strategy)
        result = ways.measure(model, shipping, wanted, config)
    else:
        with ui.progress() as progress:
            result = run(
                model, strategies=strategy or (), caches=cache or (), nproc=nproc, drop_caches=drop_caches,
                construct=construct, scratch=scratch, against=compare, floors=floors, **wanted, config=config,
                progress=progress,
            )  # fmt: skip
    for path in report or ():
        write_report(result, path)
    if json:
        ui.show_json(result)
    else:
        (ways.show if result.scenarios else bench_table.show)(result)
    if not result.complete and saved is None:
        raise KeyboardInterrupt("the figures are of the runs before that")
    if short := [why for floor in floors if (why := floor.shortfall(result))]:
        raise WeightctlError("; ".join(short), "see which of reading, copying and the strategy has become slower")
    statuses = [row.status for row in result.results] + [row.status for row in result.scenarios]
    if "ok" not in statuses:
        raise typer.Exit(1)
