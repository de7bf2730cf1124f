"""The OCI image format: names, layers as tar streams, config and manifest. Reproducible to the byte."""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from weightctl import storage
from weightctl.digests import DigestCache, unchanging
from weightctl.errors import IntegrityError, UsageError
from weightctl.model import File, Snapshot
from weightctl.progress import Task

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = f"{LAYER}+gzip"
LAYER_ZSTD = f"{LAYER}+zstd"

NAME_ANNOTATION = "io.containerd.image.name"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
DIGEST = re.compile("sha256:[0-9a-f]{64}")
MAX_JSON_BYTES = 4 << 20
"""What registries commonly accept of a manifest."""

MAX_LAYERS = 120
"""Docker 20.10 takes 125 layers and refuses more ("max depth exceeded"); some are left for whoever builds on top."""

LAYER_FORMAT = "1"
"""Goes up when the same file would become other layer bytes."""

_NAME = re.compile(
    r"(?:(?P<registry>(?:[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+|localhost|[a-zA-Z0-9-]+(?=:\d))(?::\d+)?)/)?"
    r"(?P<repository>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class ImageName:
    """`[registry/]repository[:tag]`, as Docker reads it."""

    registry: str | None
    repository: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Take a tag apart; `:latest` is added if there is none. Raises UsageError for what is no image name."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise UsageError(
                f"not an image name: {text!r}", "write [registry/]name[:tag], the name in lower case: llama:v1"
            )
        return cls(match["registry"], match["repository"], match["tag"] or "latest")

    def __str__(self) -> str:
        return f"{self.registry + '/' if self.registry else ''}{self.repository}:{self.tag}"

    @property
    def canonical(self) -> str:
        """With the registry that engines assume."""
        if self.registry:
            return str(self)
        return f"docker.io/{'' if '/' in self.repository else 'library/'}{self}"


@dataclass(frozen=True)
class Descriptor:
    """A blob: what it is, its digest and its size in bytes."""

    media_type: str
    digest: str
    size: int

    @classmethod
    def of(cls, media_type: str, content: bytes) -> Descriptor:
        """The descriptor of `content`."""
        return cls(media_type, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))

    def to_json(self) -> dict[str, Any]:
        """As manifests and indexes hold it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class WrittenLayer:
    """A layer that exists: its blob, and the digest of its uncompressed tar stream."""

    blob: Descriptor
    diff_id: str


@dataclass(frozen=True)
class BaseImage:
    """An image that the model's layers are put on; its layers stay the blobs that they are."""

    name: str
    config: Mapping[str, Any]
    """Its image config, parsed."""
    layers: tuple[WrittenLayer, ...]
    open: Callable[[Descriptor], BinaryIO]
    """A blob's bytes. Raises WeightctlError if they cannot be had; whoever reads them checks the digest."""
    repository: ImageName | None = None
    """The registry's repository that holds its blobs, from which the same registry can mount them."""


@dataclass(frozen=True)
class LayerPlan:
    """A layer to be: some of the model's files, under the directory that the image keeps them in."""

    directory: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of the tar stream, known before anything is read."""
        headers = sum(len(header) for header, _ in self.members())
        return _padded(headers + sum(_padded(file.size) for file in self.files) + len(_END), tarfile.RECORDSIZE)

    @property
    def key(self) -> str:
        """What, apart from the bytes of the files, makes up the layer's bytes."""
        names = [self.directory, *(file.path for file in self.files)]
        return f"layer:{LAYER_FORMAT}:{json.dumps(names)}"

    def members(self) -> Iterator[tuple[bytes, File | None]]:
        """Every entry's tar header, and the file whose bytes follow it."""
        targets = [(PurePosixPath(self.directory) / file.path, file) for file in self.files]
        directories = {parent for target, _ in targets for parent in target.parents if parent.name}
        for directory in sorted(directories):
            yield _tar_header(f"{str(directory).lstrip('/')}", None), None
        for target, file in targets:
            yield _tar_header(str(target).lstrip("/"), file.size), file


def write_layer(layer: LayerPlan, sinks: Sequence[storage.Sink], task: Task) -> str:
    """Give the layer's bytes to every sink; return their digest, and remember it.

    Every file's bytes are compared with what its source claims of them, unless they were before and have not changed
    since. Raises IntegrityError if they differ, or if a file changes meanwhile.
    """
    cache = DigestCache()
    digest = hashlib.sha256()
    sinks = [digest.update, *sinks]
    written = 0
    identities = {}

    def put(block: bytes) -> None:
        nonlocal written
        written += len(block)
        for sink in sinks:
            sink(memoryview(block))

    for header, file in layer.members():
        put(header)
        if file is None:
            continue
        unproven = file.sha256 is not None and cache.get("sha256", file.source) != file.sha256
        content = hashlib.sha256()
        with unchanging(file.source) as seen, file.source.open("rb", buffering=0) as source:
            identities[file] = seen
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
    if len(layer.files) == 1:
        cache.put(layer.key, layer.files[0].source, identities[layer.files[0]], f"sha256:{digest.hexdigest()}")
    return f"sha256:{digest.hexdigest()}"


def remembered_digest(layer: LayerPlan) -> str | None:
    """The layer's digest, if it was written from these very files before."""
    return DigestCache().get(layer.key, layer.files[0].source) if len(layer.files) == 1 else None


def layer_digest(layer: LayerPlan) -> str:
    """The layer's digest, which costs a reading of its files unless it is remembered."""
    return remembered_digest(layer) or write_layer(layer, [], Task())


def plain_layer(layer: LayerPlan, digest: str) -> WrittenLayer:
    """The layer as an uncompressed blob, whose digest is its diffID too."""
    return WrittenLayer(Descriptor(LAYER, digest, layer.size), digest)


def copy_blob(source: BinaryIO, blob: Descriptor, sinks: Sequence[storage.Sink], task: Task) -> None:
    """Give a blob's bytes to every sink. Raises IntegrityError if they are not those that its digest names."""
    digest = hashlib.sha256()
    with source:
        storage.pump(source, blob.size, [digest.update, *sinks], task)
    if f"sha256:{digest.hexdigest()}" != blob.digest:
        raise IntegrityError(f"the blob {blob.digest} is damaged: it hashes to sha256:{digest.hexdigest()}")


def index_entry(manifest: Descriptor, name: ImageName, platform: str) -> dict[str, Any]:
    """How an index lists an image, so that containerd finds it by its name and skopeo by its tag."""
    os_name, architecture, *variant = platform.split("/")
    return {
        **manifest.to_json(),
        "platform": {"os": os_name, "architecture": architecture, **({"variant": variant[0]} if variant else {})},
        "annotations": {NAME_ANNOTATION: name.canonical, TAG_ANNOTATION: name.tag},
    }


class LayerReader(io.RawIOBase):
    """A layer's bytes as a file, from any offset: what an upload that broke off goes on with.

    It hashes nothing: whoever receives the bytes compares them with the digest that `write_layer` found.
    """

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


@dataclass(frozen=True)
class ImagePlan:
    """An image to be: its layers, and what its config and manifest say besides."""

    layers: tuple[LayerPlan, ...]
    directory: str
    """Where the model's files are in the image."""
    platform: str
    """`os/architecture[/variant]`."""
    annotations: Mapping[str, str]
    base: BaseImage | None = None

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def base_layers(self) -> tuple[WrittenLayer, ...]:
        """Those that the model's layers are put on."""
        return self.base.layers if self.base else ()

    @property
    def base_blobs(self) -> list[Descriptor]:
        """The blobs of the base's layers, each once."""
        return list(dict.fromkeys(layer.blob for layer in self.base_layers))

    def open_base_blob(self, blob: Descriptor) -> BinaryIO:
        """A blob of the base."""
        if self.base is None:
            raise ValueError("an image on scratch has no base")
        return self.base.open(blob)

    def config(self, layers: Sequence[WrittenLayer]) -> bytes:
        """The image config, given the model's layers as written: the base's, and what the model adds to it."""
        base: dict[str, Any] = dict(self.base.config) if self.base else {}
        os_name, architecture, *variant = self.platform.split("/")
        settings = dict(base.get("config") or {})
        own = f"{MODEL_DIRECTORY_VARIABLE}={self.directory}"
        inherited = [item for item in settings.get("Env") or [] if not item.startswith(f"{MODEL_DIRECTORY_VARIABLE}=")]
        inherited_history = base.get("history") or [{"created_by": "the base image"} for _ in self.base_layers]
        history = [{"created_by": f"weightctl bake: {_contents(layer)}"} for layer in self.layers]
        config: dict[str, Any] = {
            **{key: base[key] for key in ("author", "created", "os.version", "os.features") if key in base},
            **({"created": self.annotations[CREATED]} if CREATED in self.annotations else {}),
            "architecture": architecture,
            "os": os_name,
            **({"variant": variant[0]} if variant else {}),
            "config": {**settings, "Env": [*inherited, own]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in (*self.base_layers, *layers)]},
            "history": [*inherited_history, *history],
        }  # fmt: skip
        return _canonical(config)

    def manifest(self, config: Descriptor, layers: Sequence[WrittenLayer]) -> bytes:
        """The image manifest, given the model's layers as written."""
        return _canonical({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.to_json(),
            "layers": [layer.blob.to_json() for layer in (*self.base_layers, *layers)],
            **({"annotations": dict(self.annotations)} if self.annotations else {}),
        })  # fmt: skip


MODEL_DIRECTORY_VARIABLE = "WEIGHTCTL_MODEL_DIR"
CREATED = "org.opencontainers.image.created"


def _contents(layer: LayerPlan) -> str:
    return layer.files[0].path if len(layer.files) == 1 else f"{len(layer.files)} small files"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def plan_image(
    snapshot: Snapshot, directory: str, platform: str, created: str | None, base: BaseImage | None = None
) -> ImagePlan:
    """One layer a weight file, by path, then one with all small files.

    The small files change most easily, and an engine that keys layers on what lies below them then keeps the weights.
    """
    small = tuple(file for file in snapshot.files if not file.is_weight)
    room = MAX_LAYERS - len(base.layers if base else ()) - bool(small)
    groups = _packed([file for file in snapshot.files if file.is_weight], room)
    groups += [small] if small else []
    annotations = {}
    if snapshot.repo_id:
        annotations["org.opencontainers.image.source"] = f"https://huggingface.co/{snapshot.repo_id}"
    if snapshot.commit:
        annotations["org.opencontainers.image.revision"] = snapshot.commit
    if created:
        annotations[CREATED] = created
    layers = tuple(LayerPlan(directory, files) for files in groups)
    return ImagePlan(layers, directory, platform, annotations, base)


def _packed(files: Sequence[File], room: int) -> list[tuple[File, ...]]:
    """At most `room` groups of files, of about one size: the largest file first, each to the group that has least."""
    if room < 1:
        raise UsageError(f"the base has too many layers: with the model's they would be more than {MAX_LAYERS}")
    groups: list[list[File]] = [[] for _ in range(min(room, len(files)))]
    for file in sorted(files, key=lambda file: (-file.size, file.path)):
        min(groups, key=lambda group: sum(other.size for other in group)).append(file)
    ordered = [tuple(sorted(group, key=lambda file: file.path)) for group in groups]
    return sorted(ordered, key=lambda group: group[0].path)


def check_directory(path: str) -> str:
    """Return `path` if it can be the directory of a model in an image; raise UsageError otherwise."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or not parts or any(part in ("", ".", "..") for part in parts) or "\0" in path:
        raise UsageError(f"not a directory for the model: {path!r}", "give an absolute path below /: /models/llama")
    return path


def check_created(time: str) -> str:
    """Return `time` if it is an RFC 3339 time; raise UsageError otherwise."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", time, re.ASCII):
            datetime.fromisoformat(time[:19])
            return time
    except ValueError:
        pass
    raise UsageError(f"not an RFC 3339 time: {time!r}", "write 2026-01-31T12:00:00Z")


def check_platform(platform: str) -> str:
    """Return `platform` if it reads OS/ARCH[/VARIANT]; raise UsageError otherwise."""
    if not re.fullmatch(r"[a-z0-9]+/[a-z0-9]+(/[a-z0-9]+)?", platform):
        raise UsageError(f"not a platform: {platform!r}", "write os/architecture: linux/amd64 or linux/arm64")
    return platform
