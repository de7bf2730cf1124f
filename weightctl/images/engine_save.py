"""An image that an engine saves, read back as a base: its layers as files, its config as an image's own."""

from __future__ import annotations

import functools
import io
import json
import posixpath
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from weightctl.digests import hash_files
from weightctl.errors import WeightctlError, translated_os_errors
from weightctl.images.engine import PIPE_BYTES, Engine, diff_ids, engine_errors
from weightctl.images.oci import LAYER, LAYER_GZIP, LAYER_ZSTD, BaseImage, Descriptor, WrittenLayer
from weightctl.model import File
from weightctl.progress import Progress

CONFIG_FIELDS = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
    "Healthcheck", "OnBuild", "Shell",
)  # fmt: skip
"""Of what an engine says of an image, what its config holds."""

MAGIC = {b"\x1f\x8b": LAYER_GZIP, b"\x28\xb5\x2f\xfd": LAYER_ZSTD}
"""How compressed layers begin."""


def named_image(image: dict[str, Any], name: str) -> BaseImage:
    """A base that stays in the engine, of which no more than its layers' names is needed."""
    layers = tuple(WrittenLayer(Descriptor(LAYER, diff_id, 0), diff_id) for diff_id in diff_ids(image))
    return BaseImage(name, _config_of(image), layers, _not_sent)


def saved_image(engine: Engine, image: dict[str, Any], name: str, directory: Path) -> BaseImage:
    """A base whose layers are saved as files in `directory`. Raises WeightctlError if the engine saves them oddly."""
    chunks = _Chunks(engine.api.get_image(name, chunk_size=PIPE_BYTES))
    try:
        with translated_os_errors(f"save {name} in {directory}"), tarfile.open(fileobj=chunks, mode="r|") as saved:
            files = _extract(saved, directory)
        names = json.loads(files["manifest.json"].read_bytes())[0]["Layers"]
        found = [_saved_layer(files[layer], diff_id) for layer, diff_id in zip(names, diff_ids(image), strict=True)]
    except (KeyError, ValueError, TypeError, IndexError, tarfile.TarError) as error:
        message = f"the engine saved {name} in a form that is not known: {error!r}"
        raise WeightctlError(message, "push it, and name it as --base registry:NAME") from error
    paths = {layer.blob.digest: path for layer, path in found}
    opened = functools.partial(_open_saved, paths)
    return BaseImage(name, _config_of(image), tuple(layer for layer, _ in found), opened)


def _config_of(image: dict[str, Any]) -> dict[str, Any]:
    """An image config, from what the engine says of the image."""
    settings = {key: value for key, value in (image.get("Config") or {}).items() if key in CONFIG_FIELDS and value}
    variant = {"variant": image["Variant"]} if image.get("Variant") else {}
    return {"architecture": image["Architecture"], "os": image["Os"], **variant, "config": settings}


class _Chunks(io.RawIOBase):
    """The file that a generator's chunks make up."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with engine_errors():  # which are OSErrors too: they must not be taken for those of the files saved to
            self._left = self._left or next(self._chunks, b"")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _extract(saved: tarfile.TarFile, directory: Path) -> dict[str, Path]:
    """A saved image's members as files under names of our own; a layer that occurs twice is a link to the first."""
    files: dict[str, Path] = {}
    links: dict[str, str] = {}
    for number, member in enumerate(saved):
        if member.issym():
            links[member.name] = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.linkname))
        elif (content := saved.extractfile(member)) is not None:
            files[member.name] = directory / str(number)
            with files[member.name].open("wb") as stream:
                shutil.copyfileobj(content, stream, PIPE_BYTES)
    return {**files, **{name: files[target] for name, target in links.items() if target in files}}


def _saved_layer(path: Path, diff_id: str) -> tuple[WrittenLayer, Path]:
    with path.open("rb") as stream:
        media_type = next((kind for magic, kind in MAGIC.items() if stream.peek(4).startswith(magic)), LAYER)
    (read,) = hash_files([File("layer", path.stat().st_size, path)], 1, None, Progress())
    blob = Descriptor(media_type, f"sha256:{read.sha256}", read.size)
    return WrittenLayer(blob, diff_id), path


def _not_sent(blob: Descriptor) -> BinaryIO:
    raise WeightctlError(f"the engine has lost the layer {blob.digest} of the base", "pull the base image again")


def _open_saved(paths: dict[str, Path], blob: Descriptor) -> BinaryIO:
    return paths[blob.digest].open("rb")
