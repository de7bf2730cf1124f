"""A volume in a mounted directory: VOLUME/NAME/VERSION/files and VOLUME/NAME/latest → VERSION."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check, DigestCache, Identity, check_against, check_files, hash_files
from weightctl.errors import IntegrityError, UsageError, WeightctlError, translated_os_errors
from weightctl.model import File, Snapshot, check_name
from weightctl.progress import Progress
from weightctl.volumes import leases
from weightctl.volumes.base import Pruned, Published, Version, Volume, volumes
from weightctl.volumes.copying import copy_files
from weightctl.volumes.manifests import Manifests, PublishedFile, has_size
from weightctl.volumes.staging import Staging

VERSION_DIGITS = 16
"""A version is so many hex digits of its snapshot's digest: equal models have equal versions everywhere."""

_VERSION = re.compile(f"[0-9a-f]{{{VERSION_DIGITS}}}")

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""How filesystems answer that have no links."""


@volumes.register("directory")
class DirectoryVolume(Volume):
    """A directory: a local disk, NFS, or any mount that renames atomically."""

    summary = "a mounted directory"

    def __init__(self, path: Path | str) -> None:
        path = Path(path).expanduser()
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist"
            raise UsageError(f"the volume {path} {what}", "mount it, or create the directory, first")
        self.path = path.absolute()
        self._mounted = path.stat()
        self._control = self.path / ".weightctl"
        self._staging = Staging(self._control / "staging")
        self._manifests = Manifests(self._control / "manifests", self.path)
        self._latest: dict[str, Path] = {}

    # Pushing.

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
        """See `Volume.publish`. What a push that died has copied is taken up again if it still equals the source."""
        check_name(name)
        self._latest.pop(name, None)

        def tell() -> None:
            progress.note(f"another process is pushing the same model to {self.path}: waiting for it")

        with translated_os_errors(f"write to the volume {self.path}"):
            snapshot = self._identified(snapshot, config, progress)
            self._staging.sweep((f"{_flat(name)}@", "@prune"), keep=(key := f"{_flat(name)}@{_key(snapshot)}"))
            with self._staging.work(key, tell) as work:
                self._check_mount()
                path = self._path(snapshot, name)
                wanted = snapshot.files if path is None else self._doubtful(snapshot, path, verify, config, progress)
                staged, copied = self._stage(wanted, downloads or work / "files", config, progress)
                known = {file.path: file for file in staged}
                snapshot = snapshot.replace_files([known.get(file.path, file) for file in snapshot.files])
                with self._naming(name):
                    self._check_mount()
                    path = self._publish(snapshot, name, staged, downloads or work / "files", work)
                    self._point_latest(path, work)
            return Published(path.name, path, copied, snapshot.bytes - copied)
