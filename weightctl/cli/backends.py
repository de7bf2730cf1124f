"""`weightctl backends`."""

from __future__ import annotations

from weightctl.cli import options, ui


def backends(json: options.Json = False) -> None:
    """List every backend.

    Whether it works here, and what to install if not.
    """
    from weightctl.operations.backends import list_backends

    found = list_backends()
    if json:
        return ui.show_json(found)
    rows = [(row.kind, row.name, "yes" if row.available else "no", row.reason or row.summary) for row in found]
    return ui.show_table(("kind", "name", "available", ""), rows)
