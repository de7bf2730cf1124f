"""A volume in a mounted directory: VOLUME/NAME/VERSION/files and VOLUME/NAME/latest → VERSION."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightctl.config import Config, expanded
from weightctl.digests import Check, check_against
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.model import Reference, Snapshot, check_name
from weightctl.progress import Progress
from weightctl.volumes.base import Pruned, Published, Version, Volume, volumes
from weightctl.volumes.gathering import seed
from weightctl.volumes.manifests import VERSION, has_size
from weightctl.volumes.mount import Mount, flat
from weightctl.volumes.pruning import prune
from weightctl.volumes.publishing import Push, place, with_remembered_digests


@volumes.register("directory")
class DirectoryVolume(Volume):
    """A directory: a local disk, NFS, or any mount that renames atomically."""

    summary = "a mounted directory"

    def __init__(self, path: Path | str) -> None:
        self._mount = Mount(expanded(path))
        self.path = self._mount.path
        self._latest: dict[str, Path] = {}

    def publish(
        self,
        snapshot: Snapshot,
        name: str,
        *,
        verify: bool = False,
        downloads: Path | None = None,
        config: Config,
        progress: Progress,
    ) -> Published:
        """See `Volume.publish`."""
        self._latest.pop(_check_name(name), None)
        with translated_os_errors(f"write to the volume {self.path}"):
            return Push(self._mount, name, verify, config, progress).run(snapshot, downloads)

    @contextmanager
    def downloads(self, name: str, *, progress: Progress) -> Iterator[Path]:
        """See `Volume.downloads`. What a dead push has downloaded is still there."""

        def tell() -> None:
            progress.note(f"another process is downloading {name} to {self.path}: waiting for it")

        with (
            translated_os_errors(f"write to the volume {self.path}"),
            self._mount.staging.work(f"{flat(_check_name(name))}@download", tell) as work,
        ):
            yield work / "files"

    def seed(self, snapshot: Snapshot, downloads: Path, *, config: Config, progress: Progress) -> None:
        """See `Volume.seed`."""
        with translated_os_errors(f"write to the volume {self.path}"):
            seed(snapshot, downloads, self._mount.manifests, config=config, progress=progress)

    def find(self, snapshot: Snapshot, name: str) -> Path | None:
        """See `Volume.find`. A version counts if every file is there with its size."""
        snapshot = with_remembered_digests(snapshot)
        path = place(self._mount, snapshot, name)
        whole = path is not None and all(has_size(path / file.path, file.size) for file in snapshot.files)
        return path if whole else None

    def resolve(self, name: str, version: str = "latest") -> Path:
        """See `Volume.resolve`."""
        with translated_os_errors(f"read the volume {self.path}"):
            if version == "latest" and (pinned := self._latest.get(name)) and pinned.is_dir():
                return pinned
            path = self._find(_check_name(name), version)
        if version == "latest":
            self._latest[name] = path
        return path

    def _find(self, name: str, version: str) -> Path:
        parent = self.path / name
        found = self._mount.latest(name) if version == "latest" else version
        if version == "latest" and found is not None and not VERSION.fullmatch(found):
            raise IntegrityError(f"{parent / 'latest'} names no version", "push the model again to mend it")
        if found is None or not VERSION.fullmatch(found) or not (parent / found).is_dir():
            known = self.versions(name)
            if not known:
                hint = f"names here: {', '.join(self.names()) or 'none'}"
                raise UsageError(f"the volume {self.path} has no model {name!r}", hint)
            hint = f"versions: {', '.join(known)}"
            raise UsageError(f"the volume {self.path} has no version {version!r} of {name!r}", hint)
        return parent.resolve() / found

    def reload(self) -> None:
        """See `Volume.reload`."""
        self._latest.clear()

    def names(self) -> list[str]:
        """The models in the volume."""
        return sorted({name for name, _ in self._mount.manifests.versions()})

    def versions(self, name: str) -> list[str]:
        """See `Volume.versions`."""
        return [version for other, version in self._mount.manifests.versions() if other == name]

    @contextmanager
    def use(self, name: str, version: str = "latest") -> Iterator[Path]:
        """See `Volume.use`."""
        with contextlib.ExitStack() as mark:
            with (
                translated_os_errors(f"mark a version as in use on the volume {self.path}"),
                self._mount.naming(_check_name(name)),
            ):
                found = self.resolve(name, version)
                mark.enter_context(self._mount.mark(name, found.name))
                self.resolve(name, found.name)  # where locks do not hold, a pruning may have come between
            yield found

    def contents(self) -> tuple[Version, ...]:
        """See `Volume.contents`."""
        with translated_os_errors(f"read the volume {self.path}"):
            return self._mount.contents()

    def check(self, name: str, version: str, *, config: Config, progress: Progress) -> Check:
        """See `Volume.check`. A file that was not published is a problem too."""
        path = self.resolve(name, version)
        expected = [entry.file for entry in self._mount.manifests.read(name, path.name)]
        found = check_against(expected, config.workers, progress)
        published = {path / file.path for file in expected}
        with translated_os_errors(f"read the volume {self.path}"):
            strays = [
                f"{file.relative_to(path).as_posix()} was not published with this version"
                for file in sorted(path.rglob("*"))
                if file.is_symlink() or (file not in published and not file.is_dir())
            ]
        return dataclasses.replace(found, problems=(*found.problems, *strays))

    def prune(
        self,
        *,
        name: str | None = None,
        keep: int | None = None,
        older_than: float | None = None,
        dry_run: bool = False,
        progress: Progress,
    ) -> Pruned:
        """See `Volume.prune`."""
        with translated_os_errors(f"prune the volume {self.path}"):
            return prune(self._mount, name, keep, older_than, dry_run, progress)


def version_at(path: Path) -> Reference | None:
    """The version of a model that the directory `path` is, if it is one in a volume.

    Raises UsageError, saying what to write, if it is the volume itself or holds the versions of a model.
    """
    with contextlib.suppress(OSError):  # whoever reads it as a directory is told
        if not path.is_dir():
            return None
        real = path.resolve()
        volume = next((root for root in (real, *real.parents) if (root / ".weightctl" / "manifests").is_dir()), real)
        manifests, inside = volume / ".weightctl" / "manifests", real.relative_to(volume)
        if (manifests / f"{inside}.json").is_file():
            return Reference("volume", str(volume), inside.parent.as_posix(), inside.name)
        if (manifests / inside).is_dir():
            hint = f"write volume:{volume}#NAME[@VERSION]; names here: {', '.join(DirectoryVolume(volume).names())}"
            raise UsageError(f"{path} is part of a volume, not a version of a model", hint)
    return None


def _check_name(name: str) -> str:
    """Return `name` if a model in a volume can be called so; raise UsageError otherwise."""
    if VERSION.fullmatch(check_name(name).split("/")[-1]):
        raise UsageError(f"not a model name in a volume: {name!r} would be taken for a version", "give another --name")
    return name
