"""`weightctl pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightctl.cli import options, ui
from weightctl.config import Config


def pull(
    model: options.Model,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Put plain files into DIR instead of the Hub's cache.", show_default=False),
    ] = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Fetch a model and check every byte.

    Prints the directory that holds it.
    """
    from weightctl.operations.pull import plan_pull
    from weightctl.operations.pull import pull as run

    config = Config.load({"workers": workers, "cache_dir": cache_dir})
    wanted = {"include": include or (), "exclude": exclude or ()}
    with ui.progress() as progress:
        if dry_run:
            plan = plan_pull(model, revision=revision, to=to, **wanted, config=config, progress=progress)
            missing = f"{plan.missing_files} of {ui.count(plan.files, 'file')}, {ui.size(plan.missing_bytes)}, to fetch"
            return ui.show_plan(plan, json, plan.path, missing)
        result = run(model, revision=revision, to=to, **wanted, config=config, progress=progress)
    fetched = f"{ui.size(result.fetched_bytes)} fetched" if result.fetched_bytes else "nothing to fetch"
    files = f"{ui.count(result.files, 'file')}, {ui.size(result.bytes)}"
    done = f"{files}, {fetched}, {'verified' if result.verified else 'read'} in {ui.seconds(result.seconds)}"
    return ui.show_result(result, json, result.path, done)
