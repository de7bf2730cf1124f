"""One blob's way into a registry's repository, through all that an upload survives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from weightctl import storage
from weightctl.config import user_directory
from weightctl.errors import IntegrityError, WeightctlError
from weightctl.images.oci import Descriptor
from weightctl.images.registry_client import Part, RegistryClient, Session
from weightctl.images.transport import Patience, RegistryError
from weightctl.progress import Task

SMALLEST_CHUNK_BYTES = 1 << 20
"""What nginx takes unless it is told to take more."""


class Memory:
    """What this machine remembers of a registry: uploads that are not finished, and who has which blob.

    It only ever saves work: where it cannot be kept, a blob is sent anew.
    """

    def __init__(self, registry: str) -> None:
        self._directory = user_directory("cache") / "weightctl" / "registries" / registry

    def repository(self, digest: str) -> str | None:
        """A repository that had the blob."""
        with contextlib.suppress(OSError, ValueError):
            text = self._path(digest).read_text()
            return text if re.fullmatch(r"[a-z0-9._/-]{1,255}", text) else None
        return None

    def remember(self, digest: str, repository: str) -> None:
        """The repository has the blob, in an image that will keep it there."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._path(digest).write_text(repository)

    @contextlib.contextmanager
    def upload(self, repository: str, digest: str) -> Iterator[Record]:
        """The record of an upload, for the time of the block: this process alone goes on with it."""
        path = self._path(f"upload of {digest} to {repository}")
        with contextlib.ExitStack() as held:
            descriptor = None
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = held.enter_context(storage.lock(path, wait=False))
                os.fchmod(descriptor, 0o600)  # whoever has an upload's URL may be able to add to it
            yield Record(path, descriptor)

    def _path(self, what: str) -> Path:
        return self._directory / hashlib.sha256(what.encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """Where an upload goes on, in a file that outlives the process."""

    path: Path
    descriptor: int | None
    """None where it cannot be kept, or another process has it."""

    def read(self) -> str | None:
        """The upload's URL, as the last process that had the record wrote it."""
        with contextlib.suppress(OSError, ValueError):
            if self.descriptor is not None:
                return os.pread(self.descriptor, 1 << 16, 0).partition(b"\n")[0].decode() or None
        return None

    def write(self, url: str) -> None:
        """Keep where it goes on. One line in one write: what an earlier, longer one leaves behind is not read."""
        with contextlib.suppress(OSError):
            if self.descriptor is not None:
                os.pwrite(self.descriptor, f"{url}\n".encode(), 0)

    def remove(self) -> None:
        """The upload is over."""
        with contextlib.suppress(OSError):
            if self.descriptor is not None:
                os.ftruncate(self.descriptor, 0)
                self.path.unlink()


class Upload:
    """A blob on its way. After a failure the registry is asked what has arrived, and the upload goes on from there."""

    def __init__(
        self, client: RegistryClient, blob: Descriptor, open_source: Callable[[], BinaryIO], record: Record, task: Task
    ) -> None:
        self.sent_bytes = 0
        """Also those that had to be sent again."""
        self._client = client
        self._blob = blob
        self._open_source = open_source
        self._record = record
        self._task = task
        self._position = self._farthest = 0
        self._patience = Patience()
        self._refused = False
        """Once: it is sent anew, and whole."""
        self._tried = 0

    def run(self, mount_from: str | None) -> None:
        """Bring the blob into the repository, unless it is there or can be mounted from another one.

        Raises RegistryError if the registry refuses it or fails too often, IntegrityError if it received other bytes
        than the digest names.
        """
        with contextlib.ExitStack() as opened:
            source: BinaryIO | None = None
            session = self._recorded()
            while current := session or self._begin(mount_from):
                storage.pause(0)
                source = source or opened.enter_context(self._open_source())
                self._reach(current.offset)
                try:
                    session = self._step(current, source)
                except RegistryError as error:
                    session = self._after(error, current)
                else:
                    if session is None:
                        break
        self._reach(self._blob.size)
        self._record.remove()

    def _recorded(self) -> Session | None:
        """The upload that an earlier process began, if the registry still knows it."""
        session = None
        with contextlib.suppress(WeightctlError):  # what cannot be gone on with begins anew
            if url := self._record.read():
                session = self._client.upload_status(Session(url), self._blob.size)
        self._position = session.offset if session else 0
        self._task.advance(self._position)
        return session

    def _begin(self, mount_from: str | None) -> Session | None:
        """A new upload; None if the blob is there."""
        return None if self._client.has_blob(self._blob) else self._client.begin_upload(self._blob, mount_from)

    def _step(self, session: Session, source: BinaryIO) -> Session | None:
        """Send a chunk, or the last one, with the digest, which may be all of the blob; None if it is complete."""
        left = self._blob.size - session.offset
        closing = self._refused or not self._client.chunked or left <= self._client.chunk_bytes
        part = Part(source, session.offset, left if closing else self._client.chunk_bytes, self._sent)
        self._tried = part.length
        if closing:
            self._client.finish_upload(session, self._blob, part)
            return None
        session = self._client.send_chunk(session, part)
        self._record.write(session.url)
        if session.offset > self._farthest:
            self._farthest = session.offset
            self._patience.reset()
        return session

    def _after(self, error: RegistryError, session: Session) -> Session | None:
        """With which upload to go on after a step failed; None for a new one."""
        if error.status in (401, 403):
            raise error
        if error.transient:
            self._patience.wait(error)
            return self._client.upload_status(session, self._blob.size)
        if error.status == 404:  # the registry has forgotten the upload
            self._patience.wait(error)
            return None
        if self._refused:
            if error.code in ("DIGEST_INVALID", "SIZE_INVALID"):
                message = f"{self._client} received other bytes than {self._blob.digest} names, twice"
                raise IntegrityError(message, "run this when nothing writes the model") from error
            raise error
        if error.status == 413 and self._tried > SMALLEST_CHUNK_BYTES:
            self._client.chunk_bytes = min(self._client.chunk_bytes, max(SMALLEST_CHUNK_BYTES, self._tried // 2))
            self._client.chunked = True
            known = self._client.upload_status(session, self._blob.size)
            if known is None:
                self._patience.wait(error)
            return known
        # A chunk that is refused, some with 416 and some with 405, is the first of many, or the registry was wrong
        # about what has arrived; a digest that is refused may be due to chunks that it joined wrongly.
        self._refused = True
        if session.offset + self._tried < self._blob.size:
            self._client.chunked = False
        return None

    def _sent(self, position: int) -> None:
        if self._tried > self._client.chunk_bytes:
            storage.pause(0)  # a chunk is waited for, a whole blob is not
        self.sent_bytes += max(0, position - self._position)
        self._reach(position)

    def _reach(self, position: int) -> None:
        self._task.advance(position - self._position)
        self._position = position
