"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="org/name[@revision], ./dir, /dir, file:///dir or volume:DIR#name[@version].",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.", show_default=False)]
Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Only these files (repeatable).", show_default=False)
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Not these files (repeatable).", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would move; touch nothing.")]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Threads that read, hash and write files.", show_default=False)
]
PlainHttp = Annotated[
    bool | None, typer.Option("--plain-http", help="Speak plain HTTP to registries without TLS.", show_default=False)
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where Hub snapshots are kept [default: the Hub library's cache].", show_default=False
    ),
]
