"""`weightctl bake`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightctl.cli import options, ui
from weightctl.config import Config

if TYPE_CHECKING:
    from weightctl.operations.bake import BakePlan


def bake(
    model: options.Model,
    tag: Annotated[str, typer.Option(metavar="NAME:TAG", help="The image's name.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="docker, registry, layout:DIR or archive:FILE [default: docker if it answers, else a layout].",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(metavar="IMAGE", help="scratch, docker:NAME, layout:DIR[#TAG] or a registry's NAME.")
    ] = "scratch",
    template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Dockerfile template that the engine builds the base from.", show_default=False
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The model's directory in the image [default: /models/NAME].", show_default=False
        ),
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(
            metavar="OS/ARCH", help="What the image runs on [default: the base's, or linux/amd64].", show_default=False
        ),
    ] = None,
    compression: Annotated[
        str, typer.Option(metavar="KIND", help="none, zstd or gzip: not for engines that keep layers unpacked.")
    ] = "none",
    created: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Say when the image was made (RFC 3339).", show_default=False),
    ] = None,
    revision: options.Revision = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    plain_http: options.PlainHttp = None,
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

    config = Config.load({"workers": workers, "cache_dir": cache_dir, "plain_http": plain_http})
    recipe = Recipe(tag, to, base, template, path, platform, compression, created)
    wanted = {"include": include or (), "exclude": exclude or ()}
    with ui.progress() as progress:
        if dry_run:
            plan = plan_bake(model, recipe, revision=revision, **wanted, config=config, progress=progress)
            return ui.show_plan(plan, json, plan.tag, _todo(plan))
        result = run(model, recipe, revision=revision, **wanted, config=config, progress=progress)
    reused = sum(layer.reused for layer in result.layers)
    done = (
        f"{result.tag} in {result.target}: {ui.count(len(result.layers), 'layer')} ({reused} reused), "
        f"{ui.size(result.bytes)}, {ui.size(result.written_bytes)} written in {ui.seconds(result.seconds)}"
    )
    return ui.show_result(result, json, result.digest, done)


def _todo(plan: BakePlan) -> str:
    existing = sum(layer.exists for layer in plan.layers)
    layers = ui.count(len(plan.layers), "layer")
    lines = [
        f"{layers} ({existing} there), {ui.size(plan.write_bytes)} to write to {plan.target}",
        *([f"disk needed: {ui.size(plan.peak_disk_bytes)}"] if plan.peak_disk_bytes else []),
        *([f"to fetch first: {ui.size(plan.missing_bytes)}"] if plan.missing_bytes else []),
        *(f"would fail: {problem}" for problem in plan.problems),
    ]
    return "\n      ".join(lines)
