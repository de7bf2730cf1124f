"""What is in an image, wherever it is: every layer read once, and compared with its digests and with a model."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from weightctl import storage
from weightctl.digests import Check
from weightctl.errors import IntegrityError
from weightctl.images.oci import BaseImage, WrittenLayer
from weightctl.images.plan import MODEL_DIRECTORY_VARIABLE
from weightctl.model import Snapshot
from weightctl.progress import Progress, Task

READ_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
"""No name, and no set of attributes, is longer: tarfile would hold any of them in memory."""

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"


def check_image(image: BaseImage, against: Snapshot | None, *, workers: int, progress: Progress) -> Check:
    """Read every layer: digest, size and diffID, and with `against` (its files hashed) the model's files themselves.

    A note names the types of layers that cannot be unpacked here, and are only compared with their digests.
    """
    directory = _model_directory(image) if against else None
    with progress.task("verifying", sum(layer.blob.size for layer in image.layers)) as task:

        def read(layer: WrittenLayer) -> _Layer:
            return _read_layer(image, layer, directory, task)

        layers = storage.in_parallel(read, image.layers, workers)
    for note in sorted({layer.note for layer in layers if layer.note}):
        progress.note(note)
    problems = [problem for layer in layers for problem in layer.problems]
    if against and directory is None:
        problems.append(f"{image.name} does not say where its model is: {MODEL_DIRECTORY_VARIABLE} is not set")
    elif against and directory:
        problems += _differences(_merged(layers), directory, against)
    return Check(len(image.layers), sum(layer.blob.size for layer in image.layers), tuple(problems))


@dataclass
class _Layer:
    """What was found in a layer."""

    problems: list[str] = field(default_factory=list)
    note: str = ""
    entries: dict[str, str] = field(default_factory=dict)
    """Absolute path → SHA-256 of a file, or else what it is."""
    removed: set[str] = field(default_factory=set)
    """Paths below which nothing of the layers below is left, nor they themselves."""
    above: set[str] = field(default_factory=set)
    """The directories that entries lie in."""


class _Digesting(io.RawIOBase):
    """A file that hashes what is read from it."""

    def __init__(self, source: BinaryIO, task: Task | None = None) -> None:
        self._source = source
        self._task = task
        self._digest = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count: int = self._source.readinto(view)  # type: ignore[attr-defined]
        self._digest.update(view[:count])
        self.size += count
        if self._task:
            self._task.advance(count)
        return count

    def drain(self) -> str:
        """Read to the end; the digest of everything."""
        buffer = memoryview(bytearray(READ_BYTES))
        while self.readinto(buffer):
            storage.pause(0)
        return f"sha256:{self._digest.hexdigest()}"


def _read_layer(image: BaseImage, layer: WrittenLayer, directory: str | None, task: Task) -> _Layer:
    found = _Layer()
    problem = None
    try:
        with image.open(layer.blob) as source:
            raw = _Digesting(source, task)
            try:
                _read_contents(layer, raw, directory, found)
            except _unpacking_errors() as error:
                found.problems.append(f"the layer {layer.blob.digest} cannot be unpacked: {error}")
            digest = raw.drain()
        if raw.size != layer.blob.size:
            problem = f"the layer {layer.blob.digest} has {raw.size} bytes instead of {layer.blob.size}"
        elif digest != layer.blob.digest:
            problem = f"the layer {layer.blob.digest} is damaged: it hashes to {digest}"
    except IntegrityError as error:
        problem = error.message
    except FileNotFoundError:
        problem = f"the layer {layer.blob.digest} is missing"
    if problem:  # whatever else is wrong with the layer comes of it
        found.problems = [problem]
    return found


def _read_contents(layer: WrittenLayer, raw: _Digesting, directory: str | None, found: _Layer) -> None:
    """Compare the diffID, and list the entries that matter to `directory`."""
    plain = _unpacked(layer.blob.media_type, raw)
    if plain is None:
        found.note = f"layers of type {layer.blob.media_type} are not unpacked here"
        return
    if directory:
        for path, content in _entries(plain, directory):
            _note_entry(path, content, found)
    diff_id = plain.drain()
    if diff_id != layer.diff_id:
        found.problems.append(f"the layer {layer.blob.digest} unpacks to {diff_id}, but its diffID is {layer.diff_id}")


def _unpacked(media_type: str, raw: _Digesting) -> _Digesting | None:
    """The layer's tar stream; None if it is none, or in zstd, which only the package zstandard unpacks."""
    if media_type.endswith(".tar"):
        return raw
    if media_type.endswith((".gzip", "+gzip")):
        return _Digesting(gzip.GzipFile(fileobj=io.BufferedReader(raw, READ_BYTES)))  # type: ignore[arg-type]
    if media_type.endswith("+zstd"):
        with contextlib.suppress(ImportError):
            import zstandard

            source: Any = raw
            return _Digesting(zstandard.ZstdDecompressor().stream_reader(source, READ_BYTES, read_across_frames=True))
    return None


def _unpacking_errors() -> tuple[type[Exception], ...]:
    known = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError, RecursionError, ValueError)
    with contextlib.suppress(ImportError):
        import zstandard

        return (*known, zstandard.ZstdError)
    return known


class Entry(tarfile.TarInfo):
    """A tar's member whose header is of a size that can be meant."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        special = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES)
        if self.type in special and self.type != tarfile.GNUTYPE_SPARSE and self.size > MAX_HEADER_BYTES:
            raise tarfile.HeaderError("a header is too large")
        return super()._proc_member(archive)  # type: ignore[misc]


def _entries(stream: _Digesting, directory: str) -> Iterator[tuple[str, str | None]]:
    """The path of every entry in or above `directory`, and its file's SHA-256, what it is, or None for a directory."""
    with tarfile.open(fileobj=stream, mode="r|", bufsize=READ_BYTES, tarinfo=Entry) as archive:
        for member in archive:
            path = posixpath.normpath("/" + member.name.lstrip("/"))
            if not _is_below(path, directory) and not _is_below(directory, posixpath.dirname(path)):
                continue
            if member.isdir():
                yield path, None
            elif member.isreg() and not member.issparse() and (content := archive.extractfile(member)):
                digest = hashlib.sha256()
                while block := content.read(READ_BYTES):
                    storage.pause(0)
                    digest.update(block)
                yield path, digest.hexdigest()
            else:
                yield path, "a link" if member.issym() or member.islnk() else "no regular file"


def _note_entry(path: str, content: str | None, found: _Layer) -> None:
    parent, name = posixpath.split(path)
    if name == OPAQUE:
        found.removed.add(parent)
    elif name.startswith(WHITEOUT):
        found.removed.add(posixpath.join(parent, name.removeprefix(WHITEOUT)))
    elif content is None:
        found.entries.pop(path, None)
    else:
        if path in found.above:
            found.entries = {other: what for other, what in found.entries.items() if not _is_below(other, path)}
        found.removed.add(path)
        found.above.update(_up_from(parent))
        found.entries[path] = content


def _merged(layers: list[_Layer]) -> dict[str, str]:
    """The entries of the layers, one on the other."""
    merged: dict[str, str] = {}
    for layer in layers:
        left = {path: what for path, what in merged.items() if layer.removed.isdisjoint(_up_from(path))}
        merged = {**left, **layer.entries}
    return merged


def _differences(entries: dict[str, str], directory: str, model: Snapshot) -> Iterator[str]:
    there = {path: content for path, content in entries.items() if _is_below(path, directory)}
    for file in model.files:
        content = there.pop(f"{directory}/{file.path}", None)
        if content is None:
            yield f"{file.path} is missing from the image"
        elif content != file.sha256:
            what = content if content.startswith(("a ", "no ")) else "another file than the model's"
            yield f"{file.path} is {what} in the image"
    yield from (f"{path} is in the image but not in the model" for path in sorted(there))


def _up_from(path: str) -> Iterator[str]:
    """The path, and every directory that it lies in."""
    yield path
    while path != "/":
        path = posixpath.dirname(path)
        yield path


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory.rstrip('/')}/")


def _model_directory(image: BaseImage) -> str | None:
    """Where the image says that its model is."""
    settings = image.config.get("config")
    variables = settings.get("Env") if isinstance(settings, dict) else None
    for variable in variables if isinstance(variables, list) else []:
        name, _, value = str(variable).partition("=")
        if name == MODEL_DIRECTORY_VARIABLE and value.startswith("/"):
            return posixpath.normpath(value)
    return None
