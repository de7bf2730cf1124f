"""Layers as tar streams, reproducible to the byte: planned, written while they are hashed, read from any offset."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from weightctl import storage
from weightctl.digests import DigestCache, Identity, unchanging
from weightctl.errors import IntegrityError
from weightctl.images.compression import CompressedReader, Compressor
from weightctl.images.oci import LAYER, Descriptor, WrittenLayer
from weightctl.model import File
from weightctl.progress import Task

LAYER_FORMAT = "1"
"""Goes up when the same file would become other layer bytes."""


@dataclass(frozen=True)
class LayerPlan:
    """A layer to be: some of the model's files, under the directory that the image keeps them in."""

    directory: str
    files: tuple[File, ...]
    compression: str = "none"
    """`none`, `zstd` or `gzip`."""

    @property
    def media_type(self) -> str:
        """Of the blob."""
        return LAYER if self.compression == "none" else f"{LAYER}+{self.compression}"

    @property
    def size(self) -> int:
        """Bytes of the tar stream, known before anything is read."""
        headers = sum(len(header) for header, _ in self.members())
        return _padded(headers + sum(_padded(file.size) for file in self.files) + len(_END), tarfile.RECORDSIZE)

    @property
    def key(self) -> str:
        """What, apart from the bytes of the files, makes up the layer's bytes."""
        names = [self.directory, *(file.path for file in self.files)]
        return f"layer:{LAYER_FORMAT}:{self.compression}:{json.dumps(names)}"

    def members(self) -> Iterator[tuple[bytes, File | None]]:
        """Every entry's tar header, and the file whose bytes follow it."""
        targets = [(PurePosixPath(self.directory) / file.path, file) for file in self.files]
        directories = {parent for target, _ in targets for parent in target.parents if parent.name}
        for directory in sorted(directories, key=lambda directory: directory.parts):
            yield _tar_header(f"{str(directory).lstrip('/')}", None), None
        for target, file in targets:
            yield _tar_header(str(target).lstrip("/"), file.size), file


def write_layer(layer: LayerPlan, sinks: Sequence[storage.Sink], task: Task) -> WrittenLayer:
    """Give the layer's blob to every sink; return what was given, and remember it.

    Every file's bytes are compared with what its source claims of them, unless they were before and have not changed
    since. Raises IntegrityError if they differ, or if a file changes meanwhile.
    """
    size = layer.size
    seen = Identity.of(layer.files[0].source)
    if layer.compression == "none":
        diff_id = _write_tar(layer, sinks, task)
        blob = Descriptor(layer.media_type, diff_id, size)
    else:
        digest, sizes = hashlib.sha256(), list[int]()
        compressor = Compressor(layer.compression, [digest.update, lambda piece: sizes.append(len(piece)), *sinks])
        diff_id = _write_tar(layer, [compressor.write], task)
        compressor.close()
        blob = Descriptor(layer.media_type, f"sha256:{digest.hexdigest()}", sum(sizes))
    if len(layer.files) == 1:
        DigestCache().put(layer.key, layer.files[0].source, seen, f"{blob.digest} {blob.size} {diff_id}")
    return WrittenLayer(blob, diff_id)


def _write_tar(layer: LayerPlan, sinks: Sequence[storage.Sink], task: Task) -> str:
    """Give the tar stream to every sink. Returns its digest, the diffID."""
    cache = DigestCache()
    digest = hashlib.sha256()
    sinks = [digest.update, *sinks]
    written = 0

    def put(block: bytes) -> None:
        nonlocal written
        written += len(block)
        for sink in sinks:
            sink(memoryview(block))

    for header, file in layer.members():
        put(header)
        if file is None:
            continue
        content = hashlib.sha256()
        unproven = not _is_proven(file, cache)
        with unchanging(file.source) as seen, file.source.open("rb", buffering=0) as source:
            storage.pump(source, file.size, [*sinks, content.update] if unproven else sinks, task)
        if unproven and content.hexdigest() != file.sha256:
            raise IntegrityError(
                f"{file.source} is damaged: it hashes to {content.hexdigest()}, not to {file.sha256}",
                "pull the model again",
            )
        if unproven:
            cache.put("sha256", file.source, seen, content.hexdigest())
        written += file.size
        put(bytes(_padded(written) - written))
    put(bytes(layer.size - written))
    return f"sha256:{digest.hexdigest()}"


def _is_proven(file: File, cache: DigestCache) -> bool:
    """Whether the file is known to be what its source claims of it, if that claims anything."""
    return file.sha256 is None or cache.get("sha256", file.source) == file.sha256


def remembered_layer(layer: LayerPlan) -> WrittenLayer | None:
    """The layer's blob, if it was made from these very files before."""
    cache, file = DigestCache(), layer.files[0]
    known = cache.get(layer.key, file.source) if len(layer.files) == 1 and _is_proven(file, cache) else None
    if known is None:
        return None
    digest, size, diff_id = known.split()
    return WrittenLayer(Descriptor(layer.media_type, digest, int(size)), diff_id)


def known_layer(layer: LayerPlan, task: Task) -> WrittenLayer:
    """The layer's blob, which costs a reading of its files unless it is remembered."""
    if (remembered := remembered_layer(layer)) is None:
        return write_layer(layer, [], task)
    task.advance(sum(file.size for file in layer.files))
    return remembered


def open_layer(layer: LayerPlan) -> BinaryIO:
    """The layer's blob as a file, readable from any offset.

    Nothing is hashed: whoever receives the bytes compares them with the digest that `write_layer` found.
    """
    plain = LayerReader(layer)
    return cast(BinaryIO, plain if layer.compression == "none" else CompressedReader(layer.compression, plain))


def copy_blob(source: BinaryIO, blob: Descriptor, sinks: Sequence[storage.Sink], task: Task) -> None:
    """Give a blob's bytes to every sink. Raises IntegrityError if they are not those that its digest names."""
    digest = hashlib.sha256()
    with source:
        storage.pump(source, blob.size, [digest.update, *sinks], task)
    if f"sha256:{digest.hexdigest()}" != blob.digest:
        raise IntegrityError(f"the blob {blob.digest} is damaged: it hashes to sha256:{digest.hexdigest()}")


class LayerReader(io.RawIOBase):
    """A layer's tar stream as a file, from any offset."""

    def __init__(self, layer: LayerPlan) -> None:
        self._parts: list[tuple[int, int, bytes | File]] = []
        self._position = 0
        self._open: tuple[File, BinaryIO] | None = None
        for header, file in layer.members():
            self._add(header, len(header))
            if file is not None:
                self._add(file, file.size)
                self._add(padding := bytes(_padded(file.size) - file.size), len(padding))
        end = self._parts[-1][1]
        self._add(bytes(layer.size - end), layer.size - end)

    def _add(self, content: bytes | File, length: int) -> None:
        start = self._parts[-1][1] if self._parts else 0
        self._parts.append((start, start + length, content))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset, as any file does."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._parts[-1][1]}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Up to the end of the entry that the position is in. Raises IntegrityError if a file has become shorter."""
        view = memoryview(buffer).cast("B")
        index = bisect.bisect_right(self._parts, self._position, key=lambda part: part[1])
        if index == len(self._parts) or not len(view):
            return 0
        start, end, content = self._parts[index]
        view = view[: end - self._position]
        if isinstance(content, bytes):
            view[:] = content[self._position - start :][: len(view)]
            count = len(view)
        else:
            count = os.preadv(self._descriptor(content), [view], self._position - start)
            if not count:
                raise IntegrityError(f"{content.source} changed while it was read", "run this when nothing writes it")
        self._position += count
        return count

    def _descriptor(self, file: File) -> int:
        if self._open is None or self._open[0] != file:
            self._close_file()
            self._open = (file, file.source.open("rb", buffering=0))
        return self._open[1].fileno()

    def _close_file(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        """Also closes the model's file."""
        self._close_file()
        super().close()


_END = bytes(2 * tarfile.BLOCKSIZE)


def _padded(size: int, to: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // to) * to


def _tar_header(name: str, size: int | None) -> bytes:
    """The header of a file of `size` bytes, or of a directory: root's, from the year 1970, 0644 or 0755."""
    try:
        name.encode()  # of other names tarfile makes a header that not every engine reads
    except UnicodeEncodeError as error:
        raise IntegrityError(f"the file name {name!r} is not UTF-8", "rename it: images hold UTF-8 names") from error
    entry = tarfile.TarInfo(name)
    if size is None:
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    else:
        entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
