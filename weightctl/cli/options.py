"""The options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from weightctl.errors import UsageError

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
    int | None,
    typer.Option(
        metavar="N", help="Threads that read, hash and write [default: one a core, 8 at most].", show_default=False
    ),
]
PlainHttp = Annotated[
    bool | None, typer.Option("--plain-http", help="Speak plain HTTP to registries without TLS.", show_default=False)
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Load to auto, cpu, cuda or cuda:N [default: auto].", show_default=False),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where Hub snapshots are kept [default: the Hub library's cache].", show_default=False
    ),
]
VolumePath = Annotated[Path, typer.Argument(metavar="VOLUME", help="The directory where the volume is mounted.")]
Keep = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Remove all but the newest N versions of a model; the latest is one.",
        show_default=False,
    ),
]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def duration(text: str) -> float:
    """`90s`, `30m`, `12h`, `7d` or `4w` in seconds. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII)
    if not found:
        raise UsageError(f"not a duration: {text!r}", "write a number and a unit: 90s, 30m, 12h, 7d or 4w")
    return float(found[1]) * _SECONDS[found[2]]


_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_PREFIXES |= {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def bandwidth(text: str) -> float:
    """`500MB`, `1.5GiB/s` or `10Gbit/s` in bytes a second. Raises UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([kMGT]?|[KMGT]i)(B|bit|bps)(/s)?", text, re.ASCII)
    if not found or (found[3] == "bps" and found[4]) or not float(found[1]):
        raise UsageError(
            f"not a bandwidth: {text!r}", "write a number and a unit: 500MB, 1.5GiB or 10Gbit (a second; bit is not B)"
        )
    return float(found[1]) * _PREFIXES[found[2]] / (1 if found[3] == "B" else 8)
