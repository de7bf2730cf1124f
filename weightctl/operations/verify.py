"""Read every byte of something that weightctl made or fetched, and compare it with what it should be."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from weightctl.checkpoint import read_checkpoint
from weightctl.config import Config
from weightctl.digests import Check, check_against
from weightctl.errors import IntegrityError, UsageError
from weightctl.images import images
from weightctl.loaders.tensorizer import check_tensorizer
from weightctl.model import Reference
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import volumes


@dataclass(frozen=True)
class VerifyResult:
    """What a reading of every byte found."""

    target: str
    files: int
    bytes: int
    verified: bool
    problems: tuple[str, ...]
    seconds: float


def verify(target: str, *, config: Config, progress: Progress) -> VerifyResult:
    """Check `target`: a model's directory, `volume:DIR#name[@version]`, an OCI layout, or a Tensorizer file.

    What is compared: in the Hub's cache, each file with its name, which is its hash; anywhere, the headers of
    safetensors files; in a volume, each file with what was pushed; in an image, digests, sizes and diffIDs; in a
    Tensorizer file, each tensor with the hash beside it. Raises UsageError if there is nothing to verify.
    """
    began = time.monotonic()
    found = _check(target, config, progress)
    return VerifyResult(
        target, found.files, found.bytes, not found.problems, found.problems, time.monotonic() - began
    )


def _check(target: str, config: Config, progress: Progress) -> Check:
    if target.startswith("volume:"):
        reference = Reference.parse(target)
        volume = volumes.get("directory")(Path(reference.location))
        return volume.check(str(reference.name), reference.revision or "latest", config=config, progress=progress)
    path = Path(target.removeprefix("layout:")).expanduser()
    if target.startswith("layout:") or (path / "oci-layout").is_file():
        return images.get("layout")(str(path)).check(config=config, progress=progress)
    if path.is_file():
        return check_tensorizer(path, progress=progress)
    if path.is_dir():
        return _check_directory(path, config, progress)
    raise UsageError(f"nothing to verify at {target!r}", "give a directory, volume:DIR#name, an OCI layout or a file")


def _check_directory(path: Path, config: Config, progress: Progress) -> Check:
    try:
        snapshot = read_directory(path)
        found = check_against(snapshot.files, config.workers, progress)
        if any(file.is_weight for file in snapshot.files):
            read_checkpoint(snapshot)
    except IntegrityError as error:
        return Check(0, 0, (error.message,))
    return found
