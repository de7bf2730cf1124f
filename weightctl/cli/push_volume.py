"""`weightctl push-volume`."""

from __future__ import annotations

from typing import Annotated

import typer

from weightctl.cli import options, ui
from weightctl.config import Config


def push_volume(
    model: options.Model,
    volume: options.VolumePath,
    name: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="The model's name there [default: its own].", show_default=False),
    ] = None,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep: options.Keep = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a version that is there already, and mend what is damaged of it.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Download a Hub model to the volume itself, past the Hub's cache.")
    ] = False,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Publish a model on a volume.

    It becomes a new version, and the latest one. Prints the version's directory.
    """
    from weightctl.operations.push_volume import plan_push
    from weightctl.operations.push_volume import push_volume as run

    config = Config.load({"workers": workers, "cache_dir": cache_dir})
    wanted = {"include": include or (), "exclude": exclude or ()}
    with ui.progress() as progress:
        if dry_run:
            plan = plan_push(model, volume, name=name, revision=revision, **wanted, config=config, progress=progress)
            todo = "there already" if plan.exists else f"{ui.count(plan.files, 'file')}, {ui.size(plan.bytes)}, to copy"
            todo += f"; {ui.size(plan.missing_bytes)} to fetch first" if plan.missing_bytes else ""
            return ui.show_plan(plan, json, plan.path, f"{plan.name}: {todo}")
        result = run(
            model, volume, name=name, revision=revision, **wanted, keep=keep, verify=verify, no_cache=no_cache,
            config=config, progress=progress,
        )  # fmt: skip
    copied = f"{ui.size(result.copied_bytes)} copied and verified" if result.copied_bytes else "nothing to copy"
    what = f"{result.name}@{result.version}: {ui.count(result.files, 'file')}, {ui.size(result.bytes)}"
    done = f"{what}, {copied} in {ui.seconds(result.seconds)}"
    return ui.show_result(result, json, result.path, done)
