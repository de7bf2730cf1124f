"""A client of the OCI distribution API: blobs, manifests and uploads of one repository."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from weightctl.errors import IntegrityError, translated_os_errors
from weightctl.images.blob_reader import BlobReader
from weightctl.images.oci import INDEX, MANIFEST, Descriptor, ImageName
from weightctl.images.transport import BLOCK_BYTES, Answer, Patience, RegistryError, Transport

if TYPE_CHECKING:
    import requests

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_LIST)

OCTETS = {"Content-Type": "application/octet-stream"}

CHUNK_BYTES = 32 << 20
NO_CHUNKS = re.compile(r"ghcr\.io|([a-z]+\.)?gcr\.io|[a-z0-9-]+-docker\.pkg\.dev")
"""Registries that are sent each blob in one request: GitHub's refuses chunks of more than 4 MiB (github.com/wasmCloud/
wash-archive/issues/268), Google's all of them (cloud.google.com/artifact-registry/docs/reference/docker-api). Others
that refuse one say so when they meet it."""


def takes_chunks(registry: str) -> bool:
    """Whether a registry, by its host, is sent blobs in chunks until it refuses one."""
    return not NO_CHUNKS.fullmatch(registry)


@dataclass(frozen=True)
class Session:
    """An upload that a registry has begun: where it goes on, and how many bytes of the blob have arrived."""

    url: str
    offset: int = 0


class Part:
    """Bytes of a file as the body of a request, read while they are sent, and again if they are sent again."""

    def __init__(self, source: BinaryIO, start: int, length: int, report: Callable[[int], None]) -> None:
        """`report` is told each offset that was reached, `start` first."""
        self._source = source
        self._report = report
        self.start = start
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[memoryview]:
        position, end = self.start, self.start + self.length
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self.length)))
        self._report(position)
        while position < end:
            # An OSError of the file must not be taken for one of the connection.
            with translated_os_errors("read what is to be sent"):
                self._source.seek(position)
                count = self._source.readinto(buffer[: end - position])  # type: ignore[attr-defined]
            if not count:
                raise IntegrityError("what is to be sent became shorter", "run this when nothing writes the model")
            yield buffer[:count]
            position += count
            self._report(position)


class RegistryClient:
    """One repository of one registry. May be used by several threads at once."""

    def __init__(self, name: ImageName, *, actions: str, plain_http: bool = False) -> None:
        """`actions` are those that tokens are asked for: `pull` or `pull,push`."""
        self.registry, _, rest = name.canonical.partition("/")
        self.repository = rest.rpartition(":")[0]
        self.chunk_bytes = CHUNK_BYTES
        """Sent in one request; becomes less where a registry says that it is too much."""
        self.chunked = takes_chunks(self.registry)
        """Whether blobs may be sent in chunks; becomes false where a registry refuses one."""
        self._transport = Transport(self.registry, self.repository, actions=actions, plain_http=plain_http)

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}"

    def _url(self, path: str) -> str:
        return f"{self._transport.origin}/v2/{self.repository}/{path}"

    # blobs

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether the repository has the blob, as far as it says."""
        answer = self._transport.call("HEAD", self._url(f"blobs/{blob.digest}"), expect=(200, 404))
        return answer.status == 200 and answer.headers.get("Content-Length") in (None, str(blob.size))

    def open_blob(self, blob: Descriptor) -> BinaryIO:
        """The blob's bytes, from any offset; whoever reads them checks the digest."""

        def open_at(offset: int) -> requests.Response:
            headers = {"Range": f"bytes={offset}-"} if offset else {}
            url = self._url(f"blobs/{blob.digest}")
            response = self._transport.stream(url, headers, expect=(200, 206, 404, 416))
            if response.status_code in (404, 416):
                response.close()
                raise IntegrityError(f"{self} lacks the blob {blob.digest}, or some of its {blob.size} bytes")
            return response

        return BlobReader(blob, f"{blob.digest} in {self}", open_at)  # type: ignore[return-value]

    # manifests

    def manifest(self, reference: str) -> tuple[Descriptor, bytes] | None:
        """The manifest or index with a tag or digest, or None. Raises IntegrityError for other bytes than its."""
        accept = {"Accept": ", ".join(MANIFEST_TYPES)}
        answer = self._transport.call("GET", self._url(f"manifests/{reference}"), expect=(200, 404), headers=accept)
        if answer.status == 404:
            return None
        found = Descriptor.of(answer.headers.get("Content-Type", "").partition(";")[0].strip(), answer.content)
        named = reference if ":" in reference else answer.headers.get("Docker-Content-Digest", found.digest)
        if named.startswith("sha256:") and named != found.digest:
            raise IntegrityError(f"{self} has other bytes as the manifest {named}: they hash to {found.digest}")
        return found, answer.content

    def put_manifest(self, tag: str, content: bytes) -> None:
        """Let the tag mean this manifest. Raises IntegrityError if the registry gives back another one."""
        self._put_manifest(self._url(f"manifests/{tag}"), content)
        digest = Descriptor.of(MANIFEST, content).digest
        if self.manifest(digest) is None:
            raise IntegrityError(f"{self} did not keep the manifest {digest} as it was sent", "bake again")

    def delete_manifest(self, digest: str) -> None:
        """Forget a manifest and every tag of it; its blobs go when the registry collects them.

        Raises RegistryError where the registry does not let images be deleted.
        """
        self._transport.call("DELETE", self._url(f"manifests/{digest}"), expect=(200, 202, 404))

    def _put_manifest(self, url: str, content: bytes) -> None:
        patience, headers = Patience(), {"Content-Type": MANIFEST}
        while True:
            try:
                self._transport.call("PUT", url, expect=(200, 201, 202), headers=headers, body=content)
                return
            except RegistryError as error:
                # docker-registry does not find a blob at the moment when another push of it ends and rewrites its link.
                if error.code not in ("BLOB_UNKNOWN", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN"):
                    raise
                patience.wait(error)

    # uploads

    def begin_upload(self, blob: Descriptor, mount_from: str | None) -> Session | None:
        """Begin an upload; None if the registry mounts the blob from its repository `mount_from` instead."""
        query = f"?{urllib.parse.urlencode({'mount': blob.digest, 'from': mount_from})}" if mount_from else ""
        scopes = (f"repository:{mount_from}:pull",) if mount_from else ()
        try:
            answer = self._transport.call("POST", self._url(f"blobs/uploads/{query}"), expect=(201, 202), scopes=scopes)
        except RegistryError as error:
            if not mount_from or error.transient:
                raise
            return self.begin_upload(blob, None)  # it may not read the other repository
        if answer.status == 201 and mount_from:
            return None
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        if least.isdecimal():
            self.chunk_bytes = max(self.chunk_bytes, min(int(least[:12]), blob.size))
        return Session(self._location(answer))

    def upload_status(self, session: Session, size: int) -> Session | None:
        """How far an upload got, perhaps of an earlier process; None if the registry has forgotten it."""
        try:
            url = self._transport.follow(self._url(""), session.url)
            answer = self._transport.call("GET", url, expect=(200, 202, 204))
        except RegistryError as error:
            if error.transient or error.status in (401, 403):
                raise
            return None
        last = re.fullmatch(r"(?:bytes=)?0-(\d{1,19})", answer.headers.get("Range", ""))
        if last is None or int(last[1]) >= size:
            return None
        # Nothing at all reads 0-0 too. Of what was a single byte, the digest at the end would tell.
        return Session(self._location(answer, session.url), int(last[1]) and int(last[1]) + 1)

    def send_chunk(self, session: Session, part: Part) -> Session:
        """Send the next bytes of an upload. Tried once: ask for the status before sending them again.

        What the answer says of the bytes that have arrived is not looked at, since ECR's is stale
        (github.com/aws/containers-roadmap/issues/2831): the digest at the end is what counts.
        """
        answer = self._transport.send(
            "PATCH", session.url, expect=(200, 201, 202, 204), headers=_chunk_headers(part), body=part
        )
        return Session(self._location(answer, session.url), part.start + part.length)

    def finish_upload(self, session: Session, blob: Descriptor, part: Part) -> None:
        """Send the rest, and have it be the blob. Tried once."""
        url = f"{session.url}{'&' if '?' in session.url else '?'}{urllib.parse.urlencode({'digest': blob.digest})}"
        headers = _chunk_headers(part) if part.start and part.length else OCTETS
        self._transport.send("PUT", url, expect=(200, 201, 204), headers=headers, body=part)

    def _location(self, answer: Answer, otherwise: str | None = None) -> str:
        location = answer.headers.get("Location", otherwise)
        if not location:
            raise RegistryError(f"{self} does not say where to upload to", status=answer.status)
        return self._transport.follow(answer.url, location)


def _chunk_headers(part: Part) -> dict[str, str]:
    return {**OCTETS, "Content-Range": f"{part.start}-{part.start + part.length - 1}"}
