"""What the tests do with a volume in a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests import models
from weightctl.config import Config
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, Published
from weightctl.volumes.leases import Owner

READ = "weightctl.volumes.copying._read"
"""Called for each block of a file."""


def publish(volume: Path, model: Path, name: str = "m", workers: int = 2, verify: bool = False) -> Published:
    return DirectoryVolume(volume).publish(
        read_directory(model), name, verify=verify, config=Config(workers=workers), progress=Progress()
    )


def prune(volume: Path, **options: Any) -> list[str]:
    return [version.version for version in DirectoryVolume(volume).prune(**options, progress=Progress()).removed]


def problems(volume: Path, name: str = "m", version: str = "latest") -> tuple[str, ...]:
    return DirectoryVolume(volume).check(name, version, config=Config(), progress=Progress()).problems


def staged(volume: Path) -> list[Path]:
    """What lies in the volume out of sight, besides locks and manifests."""
    control = volume / ".weightctl"
    return [*(control / "staging").glob("*"), *control.rglob("*.weightctl-tmp")]


def write_lease(lease: Path, *, host: str = "elsewhere", mount: str = "another kernel 7", locked: bool = True) -> None:
    """The lease of a process on another host, whose lock nobody here sees."""
    owner = Owner(host, 4711, mount, locked, "token")
    lease.write_text(json.dumps(vars(owner)).ljust(512))


def rot(path: Path) -> None:
    """Flip a bit as a disk does: no time changes."""
    before = path.stat()
    models.flip_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
