"""`weightctl serialize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightctl.cli import options, ui
from weightctl.config import Config


def serialize(
    model: options.Model,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.", show_default=False)],
    format: Annotated[str, typer.Option(metavar="NAME", help="Its format.")] = "tensorizer",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Convert floating tensors, where from_pretrained would: bfloat16, float16, float32 or float64.",
            show_default=False,
        ),
    ] = None,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write a model as one file that loads quickly.

    It is read back and compared before it gets its name. Prints the file.
    """
    from weightctl.operations.serialize import plan_serialize
    from weightctl.operations.serialize import serialize as run

    config = Config.load({"workers": workers, "cache_dir": cache_dir})
    wanted = {"format": format, "dtype": dtype, "revision": revision}
    chosen = {"include": include or (), "exclude": exclude or ()}
    with ui.progress() as progress:
        if dry_run:
            plan = plan_serialize(model, output, **wanted, **chosen, config=config, progress=progress)  # type: ignore[arg-type]
            fetch = f"; {ui.size(plan.missing_bytes)} to fetch first" if plan.missing_bytes else ""
            return ui.show_plan(plan, json, plan.path, f"{ui.size(plan.bytes)} to write{fetch}")
        result = run(model, output, **wanted, **chosen, config=config, progress=progress)  # type: ignore[arg-type]
    done = f"{result.tensors} tensors, {ui.size(result.bytes)}, written and compared in {ui.seconds(result.seconds)}"
    return ui.show_result(result, json, result.path, done)
