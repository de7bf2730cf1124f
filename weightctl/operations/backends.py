"""List every backend of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from weightctl.benchmark.reports import reports
from weightctl.images import images
from weightctl.loaders import loaders
from weightctl.registry import Registry
from weightctl.sources import sources
from weightctl.volumes import volumes


@dataclass(frozen=True)
class BackendStatus:
    """A backend, and whether it works here."""

    kind: str
    name: str
    available: bool
    reason: str | None
    """Why not, and what to install."""
    summary: str


def list_backends() -> list[BackendStatus]:
    """Every backend, by kind, in the order of registration."""
    kinds: tuple[Registry[Any], ...] = (sources, images, volumes, loaders, reports)
    return [
        BackendStatus(kind.kind, name, reason is None, reason, kind.get(name).summary)
        for kind in kinds
        for name in kind.names()
        for reason in [kind.get(name).unavailable()]
    ]
