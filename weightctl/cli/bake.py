"""`weightctl bake`."""

from __future__ import annotations

from typing import Annotated

import typer

from weightctl.cli import options, ui
from weightctl.config import Config


def bake(
    model: options.Model,
    tag: Annotated[str, typer.Option(metavar="NAME:TAG", help="The image's name.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="layout:DIR", help="Where the image goes.")] = "layout:./image",
    base: Annotated[str, typer.Option(metavar="IMAGE", help="What the weights are added to.")] = "scratch",
    path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The model's directory in the image [default: /models/NAME].", show_default=False
        ),
    ] = None,
    platform: Annotated[str, typer.Option(metavar="OS/ARCH", help="What the image says it is for.")] = "linux/amd64",
    created: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Say when the image was made (RFC 3339).", show_default=False),
    ] = None,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    workers: options.Workers = None,
    cache_dir: options.CacheDir = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Write a model as a container image.

    Each weight file is a layer of its own. Prints the image's digest.
    """
    from weightctl.operations.bake import Recipe, plan_bake
    from weightctl.operations.bake import bake as run

    config = Config.load({"workers": workers, "cache_dir": cache_dir})
    recipe = Recipe(tag, to, base, path, platform, created)
    wanted = {"include": include or (), "exclude": exclude or ()}
    with ui.progress() as progress:
        if dry_run:
            plan = plan_bake(model, recipe, revision=revision, **wanted, config=config, progress=progress)
            fetch = f"; {ui.size(plan.missing_bytes)} to fetch first" if plan.missing_bytes else ""
            todo = f"{len(plan.layers)} layers, {ui.size(plan.bytes)}, to {to}{fetch}"
            return ui.show_result(plan, json, plan.tag, todo)
        result = run(model, recipe, revision=revision, **wanted, config=config, progress=progress)
    reused = sum(layer.reused for layer in result.layers)
    done = (
        f"{result.tag} in {to}: {len(result.layers)} layers ({reused} reused), {ui.size(result.bytes)}, "
        f"{ui.size(result.written_bytes)} written in {ui.seconds(result.seconds)}"
    )
    return ui.show_result(result, json, result.digest, done)
