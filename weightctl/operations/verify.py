"""Read every byte of something that weightctl made or fetched, and compare it with what it should be."""

from __future__ import annotations

import dataclasses
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from weightctl.checkpoint import read_checkpoint, read_safetensors_header
from weightctl.config import Config, expanded
from weightctl.digests import Check, DigestCache, check_against, hash_files
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.images import Images, images
from weightctl.loaders.tensorizer import check_tensorizer
from weightctl.model import Reference, Snapshot
from weightctl.operations import resolve
from weightctl.progress import Progress
from weightctl.sources.directory import as_downloaded, read_directory
from weightctl.volumes import version_at, volumes


@dataclass(frozen=True)
class VerifyResult:
    """What a reading of every byte found."""

    target: str
    files: int
    bytes: int
    verified: bool
    problems: tuple[str, ...]
    seconds: float


def verify(target: str, against: str | None = None, *, config: Config, progress: Progress) -> VerifyResult:
    """Check `target`: a model's directory, `volume:DIR#name[@version]`, an image, or a Tensorizer file.

    An image is an OCI layout (`[layout:]DIR`), an archive (`[archive:]FILE`) or in a registry (`[registry:]NAME:TAG`).

    What is compared: in the Hub's cache, each file with its name, which is its hash; in a directory that a Hub model
    was pulled to, with the hash that was written down there; in a volume, each file with what was pushed; in an image,
    digests, sizes and diffIDs; in a Tensorizer file, each tensor with the hash beside it; anywhere, the headers of
    safetensors files; with `against`, an image's files with that model's.
    Raises UsageError if there is nothing to verify.
    """
    began = time.monotonic()
    if (image := _image(target)) is not None:
        model = _hashed(against, config, progress) if against else None
        found = image.check(model, config=config, progress=progress)
    elif against is not None:
        hint = "give a layout, an archive or NAME:TAG, or leave out --against"
        raise UsageError(f"there is no image at {target!r} to compare with a model", hint)
    else:
        found = _check(target, config, progress)
    return VerifyResult(target, found.files, found.bytes, not found.problems, found.problems, time.monotonic() - began)


def _image(target: str) -> Images | None:
    """Where the image is that the target names: by its backend, by what lies there, or in a registry by its name."""
    kind, colon, location = target.partition(":")
    if colon and kind in images.names():
        return images.get(kind)("" if kind == "docker" else location)
    path = expanded(target)
    with translated_os_errors(f"read {path}"):
        if (path / "oci-layout").is_file():
            return images.get("layout")(target)
        if path.is_file() and tarfile.is_tarfile(path):
            return images.get("archive")(target)
        return images.get("registry")(target) if location and kind != "volume" and not path.exists() else None


def _hashed(model: str, config: Config, progress: Progress) -> Snapshot:
    """The model, with the hash of every file."""
    snapshot = resolve.resolve(model, verify=True, config=config, progress=progress)
    return snapshot.replace_files(hash_files(snapshot.files, config.workers, DigestCache(), progress))


def _check(target: str, config: Config, progress: Progress) -> Check:
    reference = Reference.parse(target) if target.startswith("volume:") else version_at(expanded(target))
    if reference:
        if not target.startswith("volume:"):
            progress.note(f"{target} is {reference}: compared with what was pushed")
        volume = volumes.get("directory")(Path(reference.location))
        return volume.check(str(reference.name), reference.revision or "latest", config=config, progress=progress)
    path = expanded(target)
    if path.is_file():
        return check_tensorizer(path, progress=progress)
    if path.is_dir():
        return _check_directory(path, config, progress)
    hint = "give a directory, volume:DIR#name, an image (a layout, an archive, NAME:TAG) or a Tensorizer file"
    raise UsageError(f"there is nothing to verify at {target!r}", hint)


def _check_directory(path: Path, config: Config, progress: Progress) -> Check:
    try:
        snapshot = as_downloaded(read_directory(path))
    except IntegrityError as error:
        return Check(0, 0, (error.message,))
    found = check_against(snapshot.files, config.workers, progress)
    if unknown := sum(not file.has_digest for file in snapshot.files):
        files = f"{unknown} of {len(snapshot.files)} files"
        progress.note(f"nothing says what {files} should hold: they were read, and safetensors headers checked")
    return dataclasses.replace(found, problems=(*found.problems, *_header_problems(snapshot)))


def _header_problems(snapshot: Snapshot) -> list[str]:
    """What is wrong with the safetensors headers, wherever they lie, and with what an index says of them."""
    problems = []
    for file in snapshot.files:
        if file.path.endswith(".safetensors"):
            try:
                read_safetensors_header(file)
            except IntegrityError as error:
                problems.append(error.message)
    if not problems:
        try:
            read_checkpoint(snapshot)
        except UsageError:
            pass  # its weights are in a format without headers to check
        except IntegrityError as error:
            problems.append(error.message)
    return problems
