"""`weightctl volumes`."""

from __future__ import annotations

import time

from weightctl.cli import options, ui


def volumes(volume: options.VolumePath, json: options.Json = False) -> None:
    """List models, versions and readers of a volume."""
    from weightctl.operations.volumes import volumes as run

    result = run(volume)
    if json:
        return ui.show_json(result)
    if not result.versions:
        return ui.show_result(result, json, None, f"no models in {volume}")
    rows = [
        (
            version.name,
            version.version,
            "latest" if version.latest else "",
            str(version.files),
            ui.size(version.bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(version.published)),
            " ".join(version.readers),
        )
        for version in result.versions
    ]
    return ui.show_table(("name", "version", "", "files", "size", "pushed", "readers"), rows)
