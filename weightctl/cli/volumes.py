"""`weightctl volumes`."""

from __future__ import annotations

import time
from itertools import groupby
from typing import TYPE_CHECKING

from weightctl.cli import options, ui

if TYPE_CHECKING:
    from weightctl.volumes import Version


def volumes(volume: options.VolumePath, json: options.Json = False) -> None:
    """List models, versions and readers of a volume."""
    from weightctl.operations.volumes import volumes as run

    result = run(volume)
    if json:
        return ui.show_json(result)
    if not result.versions:
        return ui.show_result(result, json, None, f"no models in {volume}")
    # Names are long and versions are copied: no column of a table would take either on a narrow terminal.
    lines = []
    for name, versions in groupby(result.versions, key=lambda version: version.name):
        lines += [name, *map(_line, versions)]
    return ui.show(ui.printable("\n".join(lines)))


def _line(version: Version) -> str:
    pushed = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.published))
    what = f"{ui.count(version.files, 'file'):>9}  {ui.size(version.bytes):>8}"
    readers = f"  read by {' '.join(version.readers)}" if version.readers else ""
    return f"  {version.version}  {'latest' if version.latest else '':6}  {what}  {pushed}{readers}"
