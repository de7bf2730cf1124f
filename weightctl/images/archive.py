"""One tar file that `docker load`, `podman load` and `ctr images import` all accept."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from weightctl import storage
from weightctl.config import Config, expanded
from weightctl.digests import Check
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.images.base import Baked, Images, Preview, describe, images, space_problems
from weightctl.images.bases import base_image, descriptor, index_entries
from weightctl.images.contents import Entry, check_image
from weightctl.images.layers import copy_blob, write_layer
from weightctl.images.oci import (
    CONFIG,
    MANIFEST,
    MAX_JSON_BYTES,
    BaseImage,
    Descriptor,
    ImageName,
    WrittenLayer,
    image_index,
)
from weightctl.images.plan import ImagePlan
from weightctl.model import Snapshot
from weightctl.progress import Progress, Task


@images.register("archive")
class ArchiveImages(Images):
    """An OCI layout and a Docker archive in one tar, in which each blob lies once."""

    summary = "a tar for docker load, podman load and ctr images import: --to archive:FILE"

    def __init__(self, location: str) -> None:
        self.path = expanded(location).absolute()
        if not location or self.path.is_dir():
            raise UsageError(f"--to archive:{location} names no file", "write --to archive:FILE")

    def preview(self, plan: ImagePlan, name: ImageName, *, config: Config) -> Preview:  # noqa: ARG002
        """See `Images.preview`."""
        needed = plan.size + sum(blob.size for blob in plan.base_blobs)
        return Preview((False,) * len(plan.layers), needed, space_problems(self.path.parent, needed))

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:  # noqa: ARG002
        """See `Images.bake`. The file gets its name when it is complete."""
        with translated_os_errors(f"write the archive {self.path}"):
            storage.make_directories(self.path.parent)
            storage.check_space(self.path.parent, plan.size)
            with storage.staging_beside(self.path) as staging, storage.staged_file(staging) as staged:
                with progress.task("baking", plan.size) as task:
                    manifest, written = _write_archive(TarWriter(staged.stream), plan, name, task)
                staged.publish(self.path)
            size = self.path.stat().st_size
        return Baked(manifest.digest, describe(plan.layers, [(layer, False) for layer in written]), size)

    def check(self, against: Snapshot | None = None, *, config: Config, progress: Progress) -> Check:
        """See `Images.check`."""
        with translated_os_errors(f"read {self.path}"):
            try:
                with tarfile.open(self.path, "r:", tarinfo=Entry) as tar:
                    members = {member.name: member for member in tar if member.isreg()}
            except (tarfile.TarError, RecursionError, ValueError) as error:
                return Check(0, 0, (f"{self.path} is no tar, or is cut: {error}",))
            checks = [Check(0, 0, ())]
            for entry in index_entries(self._read_json(members, "index.json"), str(self.path)):
                try:
                    image = self._image(entry, members)
                except (IntegrityError, LookupError, RecursionError, TypeError, ValueError) as error:
                    checks.append(Check(1, 0, (f"an image of {self.path} is malformed: {error}",)))
                else:
                    checks.append(check_image(image, against, workers=config.workers, progress=progress))
        problems = tuple(problem for check in checks for problem in check.problems)
        return Check(sum(check.files for check in checks), sum(check.bytes for check in checks), problems)

    def _image(self, entry: Any, members: Mapping[str, tarfile.TarInfo]) -> BaseImage:
        def open_blob(blob: Descriptor) -> BinaryIO:
            member = members.get(blob_path(blob.digest))
            if member is None:
                raise IntegrityError(f"the blob {blob.digest} is missing from {self.path}")
            return _Slice(self.path, member.offset_data, member.size)  # type: ignore[return-value]

        def read(value: Any) -> dict[str, Any]:
            blob = descriptor(value)
            if blob.size > MAX_JSON_BYTES:
                raise IntegrityError(f"the blob {blob.digest} is too large")
            content = io.BytesIO()
            copy_blob(open_blob(blob), blob, [content.write], Task())
            return dict(json.loads(content.getvalue()))

        manifest = read(entry)
        return base_image(str(self.path), manifest, read(manifest["config"]), open_blob)

    def _read_json(self, members: Mapping[str, tarfile.TarInfo], name: str) -> dict[str, Any]:
        member = members.get(name)
        if member is None or member.size > MAX_JSON_BYTES:
            raise UsageError(f"{self.path} is no OCI archive: it has no {name}", "bake it with --to archive:FILE")
        with _Slice(self.path, member.offset_data, member.size) as source:
            try:
                value = json.loads(source.read())
            except (RecursionError, ValueError) as error:
                raise IntegrityError(f"{name} in {self.path} is no JSON: {error}", "bake it again") from error
        if not isinstance(value, dict):
            raise IntegrityError(f"{name} in {self.path} is no JSON object", "bake it again")
        return value


class _Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._position, self._end = start, start + size
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self._end - self._position]
        count = os.preadv(self._file.fileno(), [view], self._position)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class TarWriter:
    """Writes a tar, a member at a time, to a stream that need not be seekable."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._write = storage.write_all(stream)
        self._position = 0

    def write(self, block: memoryview) -> None:
        """A sink for the bytes of the member that is open."""
        self._write(block)
        self._position += len(block)

    @contextmanager
    def member(self, name: str, size: int) -> Iterator[int]:
        """Begin a member whose `size` bytes the block writes. Gives the offset of its header."""
        header = self._position
        self.write(memoryview(_member_header(name, size)))
        yield header
        self.write(memoryview(bytes(-self._position % tarfile.BLOCKSIZE)))

    def rename(self, header: int, name: str, size: int) -> None:
        """Give the member whose header is at that offset its name and size. Only where the stream is a file."""
        os.pwrite(self._stream.fileno(), _member_header(name, size), header)

    def add(self, name: str, content: bytes) -> None:
        """A whole member."""
        with self.member(name, len(content)):
            self.write(memoryview(content))

    def add_json(self, name: str, value: object) -> None:
        """A whole member of JSON."""
        self.add(name, json.dumps(value, sort_keys=True).encode())

    def close(self) -> None:
        """Write the end of the tar; the stream stays open."""
        self.write(memoryview(bytes(2 * tarfile.BLOCKSIZE)))


def _member_header(name: str, size: int) -> bytes:
    """One block for any size: GNU's form, which holds more than 8 GiB where a pax header would be a second member."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)


def blob_path(digest: str) -> str:
    """Where a layout keeps a blob."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def docker_manifest(config: str, name: ImageName | None, layers: Sequence[str]) -> list[dict[str, Any]]:
    """The `manifest.json` of a Docker archive: its members' names."""
    return [{"Config": config, "RepoTags": [str(name)] if name else [], "Layers": list(layers)}]


def _write_archive(
    tar: TarWriter, plan: ImagePlan, name: ImageName, task: Task
) -> tuple[Descriptor, Sequence[WrittenLayer]]:
    for blob in plan.base_blobs:
        with tar.member(blob_path(blob.digest), blob.size):
            copy_blob(plan.open_base_blob(blob), blob, [tar.write], task)
    written: list[WrittenLayer] = []
    for layer in plan.layers:
        with tar.member(blob_path(f"sha256:{'0' * 64}"), 0) as header:
            written.append(write_layer(layer, [tar.write], task))
        tar.rename(header, blob_path(written[-1].blob.digest), written[-1].blob.size)
    config = plan.config(written)
    manifest = plan.manifest(Descriptor.of(CONFIG, config), written)
    for content in (config, manifest):
        tar.add(blob_path(Descriptor.of("", content).digest), content)
    descriptor = Descriptor.of(MANIFEST, manifest)
    tar.add_json("index.json", image_index(descriptor, name, plan.platform))
    tar.add_json("oci-layout", {"imageLayoutVersion": "1.0.0"})
    layers = [blob_path(layer.blob.digest) for layer in (*plan.base_layers, *written)]
    tar.add_json("manifest.json", docker_manifest(blob_path(Descriptor.of("", config).digest), name, layers))
    tar.close()
    return descriptor, written
