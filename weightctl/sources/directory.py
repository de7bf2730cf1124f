"""A model in a directory: plain files, or a snapshot inside the Hub's cache."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from weightctl.config import Config
from weightctl.digests import DigestCache, check_files
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.model import File, Reference, Snapshot, matches
from weightctl.progress import Progress
from weightctl.sources.base import Plan, Source, sources

NOT_THE_MODEL = (".git", ".cache/huggingface")
"""Directories in which other tools keep their own records beside a model's files."""

_HUB_RECORDS = ".cache/huggingface/download"
"""Below a directory that huggingface_hub downloaded into: beside each file's name, the hash that the Hub listed."""

_HEX = re.compile(r"[0-9a-f]+")


@sources.register("directory")
class DirectorySource(Source):
    """A directory on this machine."""

    summary = "a directory: ./dir, /dir, file:///dir"

    def plan(
        self,
        reference: Reference,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        to: Path | None = None,
        config: Config,  # noqa: ARG002
        progress: Progress,
    ) -> Plan:
        """List the directory's files through its links. Raises IntegrityError for what is no part of a model."""
        if to is not None:
            raise UsageError(f"{reference} is here already; --to is for Hub models", "to copy it, use push-volume")
        root = Path(reference.location).absolute()
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise UsageError(f"the model {reference.location!r} {what}", "give the directory that holds its files")
        snapshot = read_directory(root, include, exclude)
        for name in NOT_THE_MODEL:
            if (root / name).is_dir():
                progress.note(f"{root / name} is left out: it is no part of the model")
        return Plan(self.name, snapshot)

    def fetch(self, plan: Plan, *, verify: bool, config: Config, progress: Progress) -> Snapshot:
        """Nothing to bring. In the Hub's cache a file's name says what its hash is; small files are always read."""
        unread = [file for file in plan.snapshot.files if verify or file.git_id]
        actual, bad = check_files(unread, config.workers, DigestCache(), progress)
        if bad:
            names = ", ".join(str(file.source) for file in bad)
            raise IntegrityError(f"not what its name in the Hub's cache says: {names}", "pull the model again")
        known = {file.path: file for file in actual}
        return plan.snapshot.replace_files([known.get(file.path, file) for file in plan.snapshot.files])


def read_directory(root: Path, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Snapshot:
    """The snapshot that lies in `root`, unhashed.

    A link may point anywhere inside the model, and in the Hub's cache to the blobs of the repository and to those
    that all repositories share (huggingface_hub 2 keeps Xet files there). Raises IntegrityError for links that leave
    it, cycles, devices, sockets and pipes, UsageError if no file is left.
    """
    with translated_os_errors(f"read {root}"):
        real = root.resolve(strict=True)
        cached = _hub_cache_entry(real)
        inside = (real, cached[0] / "blobs", cached[0].parent / "blobs") if cached else (real,)
        files = tuple(
            file for file in sorted(_walk(real, "", inside, (real,)), key=lambda file: file.path)
            if matches(file.path, include, exclude)
        )  # fmt: skip
    if not files:
        hint = "the patterns of --include and --exclude match none" if include or exclude else None
        raise UsageError(f"no files in {root}", hint)
    if cached:
        _, repo_id, commit = cached
        return Snapshot(repo_id, real, files, repo_id=repo_id, revision=commit, commit=commit)
    return Snapshot(root.resolve().name or "model", real, files)


def as_downloaded(snapshot: Snapshot) -> Snapshot:
    """The same files, with the digests that the Hub listed of those that were pulled into this directory."""
    return snapshot.replace_files([_as_recorded(snapshot.root, file) for file in snapshot.files])


def _as_recorded(root: Path, file: File) -> File:
    try:
        _, etag, _ = (root / _HUB_RECORDS / f"{file.path}.metadata").read_text().split("\n", 2)
    except (OSError, ValueError):
        return file
    return dataclasses.replace(file, **_digest_called(etag))  # type: ignore[arg-type]


def _digest_called(name: str) -> dict[str, str]:
    """The Hub calls a large file by its SHA-256 and a small one by its git blob id."""
    kind = {64: "sha256", 40: "git_id"}.get(len(name))
    return {kind: name} if kind and _HEX.fullmatch(name) else {}


def _hub_cache_entry(root: Path) -> tuple[Path, str, str] | None:
    """Repository folder, repo_id and commit, if `root` is `…/models--org--name/snapshots/COMMIT`."""
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return None
    return repository, repository.name.removeprefix("models--").replace("--", "/"), root.name


def _walk(directory: Path, prefix: str, inside: Sequence[Path], above: tuple[Path, ...]) -> Iterator[File]:
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path, relative = directory / name, prefix + name
        if relative in NOT_THE_MODEL:
            continue
        target = _resolve(path, inside) if path.is_symlink() else path
        status = target.stat()
        if stat.S_ISDIR(status.st_mode):
            if target in above:
                raise IntegrityError(f"{path} is a link to a directory above it")
            yield from _walk(target, f"{relative}/", inside, (*above, target))
        elif stat.S_ISREG(status.st_mode):
            yield File(relative, status.st_size, target, **_hub_digests(path, inside))
        else:
            raise IntegrityError(f"{path} is neither a file nor a directory", "a model holds only files")


def _resolve(link: Path, inside: Sequence[Path]) -> Path:
    try:
        target = link.resolve(strict=True)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        raise IntegrityError(f"{link} is a link to nothing", "pull the model again, or remove the link") from error
    if not any(target.is_relative_to(directory) for directory in inside):
        raise IntegrityError(f"{link} is a link that leaves the model: it points to {target}")
    return target


def _hub_digests(path: Path, inside: Sequence[Path]) -> dict[str, str]:
    """What the name of its blob says, in the Hub's cache."""
    if len(inside) > 1 and path.is_symlink():
        blob = Path(os.path.normpath(path.parent / path.readlink()))
        if blob.parent == inside[1]:
            return _digest_called(blob.name)
    return {}
