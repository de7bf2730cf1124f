"""`weightctl prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from weightctl.cli import options, ui


def prune(
    volume: options.VolumePath,
    keep: options.Keep = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="D", help="Remove versions pushed so long ago: 12h, 7d, 4w.", show_default=False),
    ] = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
) -> None:
    """Remove old versions from a volume.

    Never the latest version, and never one in use. With neither --keep nor --older-than only leftovers go; with both,
    a version has to be beyond the one and older than the other.
    """
    from weightctl.operations.prune import prune as run

    age = options.duration(older_than) if older_than else None
    with ui.progress() as progress:
        result = run(volume, keep=keep, older_than=age, dry_run=dry_run, progress=progress)
    freed = f"{ui.size(result.freed_bytes)} {'to free' if dry_run else 'freed'}"
    removed = f"{ui.count(len(result.removed), 'version')}, {freed}"
    in_use = f"; {ui.count(len(result.in_use), 'version')} in use" if result.in_use else ""
    swept = f"; {ui.count(result.leftovers, 'leftover')}" if result.leftovers else ""
    show = ui.show_plan if dry_run else ui.show_result
    paths = "\n".join(str(version.path) for version in result.removed)
    show(result, json, paths or None, f"{removed}{in_use}{swept}")
