"""The local Docker engine: images streamed into it, and images in it as bases."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import itertools
import json
import os
import posixpath
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check, hash_files
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.images.archive import TarWriter, docker_manifest
from weightctl.images.base import Baked, Images, Preview, describe, images, space_problems
from weightctl.images.layers import copy_blob, known_layer, remembered_layer, write_layer
from weightctl.images.oci import LAYER, LAYER_GZIP, BaseImage, Descriptor, ImageName, WrittenLayer
from weightctl.images.plan import MODEL_DIRECTORY_VARIABLE, ImagePlan
from weightctl.model import File, Snapshot
from weightctl.progress import Progress, Task

if TYPE_CHECKING:
    import docker

PIPE_BYTES = 1 << 20
"""What an unprivileged process may make of a pipe; the engine is sent as much at a time."""

CONFIG_FIELDS = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
    "Healthcheck", "OnBuild", "Shell",
)  # fmt: skip
"""Of what an engine says of an image, what its config holds."""


@images.register("docker")
class DockerImages(Images):
    """The engine that DOCKER_HOST names, or the usual one: Docker, or podman's socket that speaks its API."""

    summary = "the local Docker engine: --to docker"
    requires: ClassVar[Mapping[str, str]] = {"docker": "docker"}

    def __init__(self, location: str = "") -> None:
        if location:
            raise UsageError(
                f"--to docker:{location}: the engine has no places", "write --to docker, and set DOCKER_HOST"
            )

    @classmethod
    def unavailable(cls) -> str | None:
        """Asks the engine for its version."""
        if reason := super().unavailable():
            return reason
        try:
            with _engine(timeout=2) as engine:
                engine.ping()
        except WeightctlError as error:
            return error.message
        return None

    def preview(self, plan: ImagePlan, name: ImageName, *, config: Config) -> Preview:  # noqa: ARG002
        """See `Images.preview`. While it loads, the engine holds what was sent twice: as sent, and unpacked."""
        with _engine() as engine:
            there = _layers_there(engine, plan, None) - len(plan.base_layers)
            root = Path(engine.info().get("DockerRootDir") or "/")
        existing = tuple(number < there for number in range(len(plan.layers)))
        needed = 2 * sum(layer.size for layer, known in zip(plan.layers, existing, strict=True) if not known)
        return Preview(existing, needed, space_problems(root, needed) if root.is_dir() else ())

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """See `Images.bake`. Sends only the layers that the engine lacks. The digest is the image's ID there."""
        with _engine() as engine:
            there = _layers_there(engine, plan, config)
            with progress.task("baking", plan.size) as task:
                written = _load(engine, plan, name, there, task)
            image = engine.api.inspect_image(str(name))
        expected = [layer.diff_id for layer in (*plan.base_layers, *written)]
        if image["RootFS"]["Layers"] != expected:
            raise IntegrityError(f"the engine holds other layers under {name} than were sent", "bake again")
        reused = max(0, there - len(plan.base_layers))
        rows = [(layer, number < reused) for number, layer in enumerate(written)]
        return Baked(image["Id"], describe(plan.layers, rows), sum(row.blob.size for row, old in rows if not old))

    def build(self, dockerfile: str, platform: str | None, progress: Progress) -> str:
        """Have the engine build an image with an empty context. Returns its ID; raises WeightctlError as it fails."""
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as tar:
            entry = tarfile.TarInfo("Dockerfile")
            entry.size = len(dockerfile.encode())
            tar.addfile(entry, io.BytesIO(dockerfile.encode()))
        context.seek(0)
        with _engine() as engine:
            built = engine.api.build(
                fileobj=context, custom_context=True, rm=True, forcerm=True, decode=True, platform=platform
            )
            identity = ""
            for message in built:
                if "error" in message:
                    raise WeightctlError(f"the engine cannot build the template: {message['error'].strip()}")
                if re.match(r"Step \d+/\d+ : ", message.get("stream", "")):
                    progress.note(message["stream"].strip())
                identity = (message.get("aux") or {}).get("ID", identity)
        return identity

    def check(self, against: Snapshot | None = None, *, config: Config, progress: Progress) -> Check:  # noqa: ARG002
        """An engine checks its own store."""
        raise UsageError("an image in an engine cannot be verified", "push it, then verify it in the registry")

    def open_base(self, name: str) -> BaseImage | None:
        """The engine's image of that name, whose layers are only known to the engine itself; None if it has none."""
        import docker.errors

        with _engine() as engine:
            try:
                image = engine.api.inspect_image(name)
            except docker.errors.ImageNotFound:
                return None
        layers = tuple(WrittenLayer(Descriptor(LAYER, diff_id, 0), diff_id) for diff_id in _diff_ids(image))
        return BaseImage(name, _config_of(image), layers, _not_sent)

    def export_base(self, name: str, directory: Path) -> BaseImage:
        """The same with its layers, first saved as files in `directory`: for a target other than this engine."""
        with _engine() as engine:
            image = engine.api.inspect_image(name)
            chunks = _Chunks(engine.api.get_image(name, chunk_size=PIPE_BYTES))
            with tarfile.open(fileobj=chunks, mode="r|") as saved:
                files = _extract(saved, directory)
        try:
            names = json.loads(files["manifest.json"].read_bytes())[0]["Layers"]
            layers = [
                _saved_layer(files[layer], diff_id) for layer, diff_id in zip(names, _diff_ids(image), strict=True)
            ]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise WeightctlError(f"the engine saved {name} in a form that is not known: {error!r}") from error
        paths = {layer.blob.digest: path for layer, path in layers}
        opened = functools.partial(_open_saved, paths)
        return BaseImage(name, _config_of(image), tuple(layer for layer, _ in layers), opened)


@contextlib.contextmanager
def _engine(timeout: int = 24 * 3600) -> Iterator[docker.DockerClient]:
    """A client; what goes wrong with it in the block is an error of ours. `timeout` is in seconds of silence."""
    import docker
    import docker.errors
    import requests

    where = os.environ.get("DOCKER_HOST", "its usual socket")
    try:
        client = docker.from_env(timeout=timeout)
        try:
            yield client
        finally:
            client.close()
    except docker.errors.APIError as error:
        full = "no space left" in str(error)
        hint = "free some of the engine's disk: docker system prune" if full else "see the engine's log"
        raise WeightctlError(f"the Docker engine refuses: {error.explanation or error}", hint) from error
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        raise WeightctlError(
            f"no Docker engine answers at {where}", "start it, set DOCKER_HOST, or bake with --to layout:DIR"
        ) from error


def _diff_ids(image: dict[str, Any]) -> list[str]:
    return list(image["RootFS"].get("Layers") or [])


def _config_of(image: dict[str, Any]) -> dict[str, Any]:
    """An image config, from what the engine says of the image."""
    settings = {key: value for key, value in (image.get("Config") or {}).items() if key in CONFIG_FIELDS and value}
    variant = {"variant": image["Variant"]} if image.get("Variant") else {}
    return {"architecture": image["Architecture"], "os": image["Os"], **variant, "config": settings}


def _is_classic(engine: docker.DockerClient) -> bool:
    """Whether the engine keeps layers by what lies below them, and so takes an image whose lower layers are not sent.

    Docker's own store does; the containerd image store and podman want every layer.
    """
    info = engine.info()
    containerd = any("containerd" in str(value) for _, value in info.get("DriverStatus") or [])
    components = engine.version().get("Components") or []
    return not containerd and any(component.get("Name") == "Engine" for component in components)


def _layers_there(engine: docker.DockerClient, plan: ImagePlan, config: Config | None) -> int:
    """How many layers of the image to be, from the lowest, the engine has and need not be sent.

    Without a config no file is read: layers count whose digests are remembered.
    """
    if not _is_classic(engine):
        return 0
    held = [image["Id"] for image in engine.api.images()]
    images_there = [engine.api.inspect_image(identity) for identity in held]
    baked_before = any(
        str(setting).startswith(MODEL_DIRECTORY_VARIABLE)
        for image in images_there
        for setting in (image.get("Config") or {}).get("Env") or []
    )
    wanted = [layer.diff_id for layer in plan.base_layers]
    if config is None:
        known = itertools.takewhile(bool, map(remembered_layer, plan.layers))
        wanted += [layer.diff_id for layer in known if layer]
    elif baked_before:  # only then is it worth reading layers whose digests are not remembered
        layers = storage.in_parallel(lambda layer: known_layer(layer, Task()), plan.layers, config.workers)
        wanted += [layer.diff_id for layer in layers]
    return max((_common(wanted, _diff_ids(image)) for image in images_there), default=0)


def _common(wanted: Sequence[str], there: Sequence[str]) -> int:
    pairs = zip(wanted, there, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _load(
    engine: docker.DockerClient, plan: ImagePlan, name: ImageName, there: int, task: Task
) -> Sequence[WrittenLayer]:
    """Send the image as a Docker archive, made while it is sent; without the lowest `there` layers."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with ThreadPoolExecutor(1) as pool, os.fdopen(reader, "rb", buffering=0) as source:
        making = pool.submit(_write_archive, writer, plan, name, there, task)

        def blocks() -> Iterator[bytes]:
            while block := source.read(PIPE_BYTES):
                yield block
            making.result()  # what broke the archive off breaks the request off: the engine then keeps nothing

        try:
            for message in engine.api.load_image(blocks(), quiet=False):
                if "error" in message:
                    raise WeightctlError(f"the Docker engine refuses the image: {message['error']}")
        finally:
            source.close()  # a writer that still waits ends with a broken pipe
        return making.result()


def _write_archive(writer: int, plan: ImagePlan, name: ImageName, there: int, task: Task) -> Sequence[WrittenLayer]:
    below = plan.base_layers
    written: list[WrittenLayer] = []
    with os.fdopen(writer, "wb", buffering=0) as stream:
        tar = TarWriter(stream)
        for number, base_layer in enumerate(below[there:], there):
            with tar.member(_member(number), base_layer.blob.size):
                copy_blob(plan.open_base_blob(base_layer.blob), base_layer.blob, [tar.write], task)
        for number, layer in enumerate(plan.layers, len(below)):
            if number < there:
                written.append(known_layer(layer, task))
                continue
            with tar.member(_member(number), layer.size):
                written.append(write_layer(layer, [tar.write], task))
        config = plan.config(written)
        tar.add("config.json", config)
        members = [_member(number) for number in range(len(below) + len(written))]
        tar.add_json("manifest.json", docker_manifest("config.json", name, members))
        tar.close()
    return written


def _member(number: int) -> str:
    return f"layers/{number}.tar"


class _Chunks(io.RawIOBase):
    """The file that a generator's chunks make up."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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
        compressed = stream.read(2) == b"\x1f\x8b"
    (read,) = hash_files([File("layer", path.stat().st_size, path)], 1, None, Progress())
    blob = Descriptor(LAYER_GZIP if compressed else LAYER, f"sha256:{read.sha256}", read.size)
    return WrittenLayer(blob, diff_id), path


def _not_sent(blob: Descriptor) -> BinaryIO:
    raise WeightctlError(f"the engine has lost the layer {blob.digest} of the base", "pull the base image again")


def _open_saved(paths: dict[str, Path], blob: Descriptor) -> BinaryIO:
    return paths[blob.digest].open("rb")
