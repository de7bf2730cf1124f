"""`weightctl config`."""

from __future__ import annotations

import dataclasses

from weightctl.cli import options, ui
from weightctl.config import Config, resolve


def config(json: options.Json = False) -> None:
    """Show every setting and its origin."""
    settings = {
        setting.name: {
            "value": value if value is None or isinstance(value, (int, str)) else str(value),
            "origin": origin,
            "allowed": setting.metadata["allowed"],
            "meaning": setting.metadata["meaning"],
        }
        for setting, (value, origin) in zip(dataclasses.fields(Config), resolve().values(), strict=True)
    }
    if json:
        return ui.show_json(settings)
    rows = [
        (name, "—" if row["value"] is None else str(row["value"]), row["origin"], row["meaning"])
        for name, row in settings.items()
    ]
    return ui.show_table(("setting", "value", "from", "meaning"), rows)
