"""`weightctl verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from weightctl.cli import options, ui
from weightctl.config import Config
from weightctl.errors import IntegrityError

MOST_PROBLEMS = 20
"""Printed; --json has all of them."""


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A model's directory, volume:DIR#name, an OCI layout or archive, a registry's NAME:TAG or a "
            "Tensorizer file.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare an image's files with this model's.", show_default=False),
    ] = None,
    plain_http: options.PlainHttp = None,
    workers: options.Workers = None,
    json: options.Json = False,
) -> None:
    """Read and compare every byte.

    Exits 3 if anything is not what it should be.
    """
    from weightctl.operations.verify import verify as run

    with ui.progress() as progress:
        config = Config.load({"workers": workers, "plain_http": plain_http})
        result = run(target, against, config=config, progress=progress)
    if json:
        ui.show_json(result)
    if result.problems:
        raise IntegrityError(_listed(target, result.problems), "fetch or make it again")
    if not json:
        done = f"{ui.count(result.files, 'file')}, {ui.size(result.bytes)}, verified in {ui.seconds(result.seconds)}"
        ui.show_result(result, json, target, done)


def _listed(target: str, problems: Sequence[str]) -> str:
    """One problem as it is, several a line each."""
    if len(problems) == 1:
        return problems[0]
    more = len(problems) - MOST_PROBLEMS
    rest = [f"and {more} more: --json lists them"] if more > 0 else []
    return "\n       ".join([f"{target} has {len(problems)} problems:", *problems[:MOST_PROBLEMS], *rest])
