"""The local Docker engine: images streamed into it, and images in it as bases."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check, hash_files
from weightctl.errors import IntegrityError, UsageError, WeightctlError, translated_os_errors
from weightctl.images.archive import TarWriter, docker_manifest
from weightctl.images.base import Baked, Images, Preview, describe, images, space_problems
from weightctl.images.layers import copy_blob, known_layer, remembered_layer, write_layer
from weightctl.images.oci import (
    CONFIG,
    LAYER,
    LAYER_GZIP,
    LAYER_ZSTD,
    MANIFEST,
    BaseImage,
    Descriptor,
    ImageName,
    WrittenLayer,
    image_index,
)
from weightctl.images.plan import MODEL_DIRECTORY_VARIABLE, ImagePlan
from weightctl.images.uploads import Memory
from weightctl.model import File, Snapshot
from weightctl.progress import Progress, Task

if TYPE_CHECKING:
    import docker

PIPE_BYTES = 1 << 20
"""What an unprivileged process may make of a pipe; the engine is sent as much at a time."""

STEP_BYTES = 1 << 30
"""After so much a load ends with the layer: an engine keeps nothing of a load that a kill breaks off."""

UNFINISHED = "weightctl.unfinished"
"""The label of the images that keep what a bake has brought so far, until it is done."""

UNFINISHED_SECONDS = 24 * 3600
"""How long they are kept for whoever bakes the same again."""

CONFIG_FIELDS = (
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
    "Healthcheck", "OnBuild", "Shell",
)  # fmt: skip
"""Of what an engine says of an image, what its config holds."""


MAGIC = {b"\x1f\x8b": LAYER_GZIP, b"\x28\xb5\x2f\xfd": LAYER_ZSTD}
"""How compressed layers begin."""


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
        """See `Images.preview`. Of what one load brings, the engine holds two: as sent, and unpacked."""
        with _engine() as engine:
            held = _held_layers(engine, plan, None)
            in_steps = _store(engine) != "containerd"
            root = Path(engine.info().get("DockerRootDir") or "/")
        existing = tuple(number in held for number in range(len(plan.base_layers), plan.count))
        unsent = [layer.size for layer, known in zip(plan.layers, existing, strict=True) if not known]
        largest_step = STEP_BYTES + max(unsent, default=0) if in_steps else sum(unsent)
        needed = sum(unsent) + min(sum(unsent), largest_step)
        return Preview(existing, needed, space_problems(root, needed) if root.is_dir() else ())

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """See `Images.bake`. Sends only the layers that the engine lacks. The digest is the image's ID there.

        In steps: after each, the engine has an image without a name of the layers so far, which a bake that follows a
        kill finds. The containerd image store, which goes by names, is sent everything at once.
        """
        written: list[WrittenLayer] = []
        with _engine() as engine:
            there = held = _held_layers(engine, plan, config)
            oci = _store(engine) == "containerd"
            with progress.task("baking", plan.size) as task:
                for end in () if oci else _steps(plan, held):
                    step = replace(plan, layers=plan.layers[:end])
                    _load(engine, functools.partial(_write_archive, step, None, there, written, oci, task))
                    there = there.union(range(step.count))
                _load(engine, functools.partial(_write_archive, plan, name, there, written, oci, task))
            image = engine.api.inspect_image(str(name))
            expected = [layer.diff_id for layer in (*plan.base_layers, *written)]
            if image["RootFS"]["Layers"] != expected:
                raise IntegrityError(f"the engine holds other layers under {name} than were sent", "bake again")
            if oci:
                memory = _memory(engine)
                for layer in (*plan.base_layers, *written):
                    memory.remember(layer.blob.digest, image["Id"].removeprefix("sha256:"))
            else:
                _remove_unfinished(engine, expected)
        rows = [(layer, number in held) for number, layer in enumerate(written, len(plan.base_layers))]
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

    def open_base(self, name: str, directory: Path, *, into_itself: bool) -> BaseImage | None:
        """The engine's image of that name; None if it has none.

        Its layers are saved as files in `directory`, unless the image stays in the engine and that needs no more than
        their names.
        """
        import docker.errors

        with _engine() as engine:
            try:
                image = engine.api.inspect_image(name)
            except docker.errors.ImageNotFound:
                return None
            if into_itself and _store(engine) == "classic":
                layers = tuple(WrittenLayer(Descriptor(LAYER, diff_id, 0), diff_id) for diff_id in _diff_ids(image))
                return BaseImage(name, _config_of(image), layers, _not_sent)
            return self._saved(engine, image, name, directory)

    def _saved(self, engine: docker.DockerClient, image: dict[str, Any], name: str, directory: Path) -> BaseImage:
        chunks = _Chunks(engine.api.get_image(name, chunk_size=PIPE_BYTES))
        with translated_os_errors(f"save {name} in {directory}"), tarfile.open(fileobj=chunks, mode="r|") as saved:
            files = _extract(saved, directory)
        try:
            names = json.loads(files["manifest.json"].read_bytes())[0]["Layers"]
            found = [
                _saved_layer(files[layer], diff_id) for layer, diff_id in zip(names, _diff_ids(image), strict=True)
            ]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise WeightctlError(f"the engine saved {name} in a form that is not known: {error!r}") from error
        paths = {layer.blob.digest: path for layer, path in found}
        opened = functools.partial(_open_saved, paths)
        return BaseImage(name, _config_of(image), tuple(layer for layer, _ in found), opened)


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


def _store(engine: docker.DockerClient) -> str:
    """How the engine keeps images: Docker's `classic` store, the `containerd` image store, or as `podman` does."""
    if not any(component.get("Name") == "Engine" for component in engine.version().get("Components") or []):
        return "podman"
    containerd = any("containerd" in str(value) for _, value in engine.info().get("DriverStatus") or [])
    return "containerd" if containerd else "classic"


def _memory(engine: docker.DockerClient) -> Memory:
    """Which blob was sent to this engine, and in which image: that, while the engine has it, keeps the blob there."""
    return Memory(f"engine-{hashlib.sha256(str(engine.info().get('ID')).encode()).hexdigest()}")


def _held_layers(engine: docker.DockerClient, plan: ImagePlan, config: Config | None) -> frozenset[int]:
    """Which layers of the image to be, counted from the lowest, the engine has and need not be sent.

    The classic store keys layers on what lies below them: it has those up to the first that differs from an image
    there. Podman finds a layer of any image. The containerd image store has any blob that an image there is made of;
    which those are it does not say, so only what we sent counts. Without a config no file is read: layers count whose
    digests are remembered.
    """
    store, images_there = _store(engine), list(_inspected(engine, {}))
    baked_before = any(
        str(setting).startswith(MODEL_DIRECTORY_VARIABLE)
        for image in images_there
        for setting in (image.get("Config") or {}).get("Env") or []
    )
    wanted: list[WrittenLayer | None] = [*plan.base_layers]
    if config is None:
        wanted += map(remembered_layer, plan.layers)
    elif baked_before:  # only then is it worth reading layers whose digests are not remembered
        wanted += storage.in_parallel(lambda layer: known_layer(layer, Task()), plan.layers, config.workers)
    if store == "containerd":
        memory, held = _memory(engine), {image["Id"].removeprefix("sha256:") for image in images_there}
        blobs = enumerate(layer and layer.blob.digest for layer in wanted)
        return frozenset(number for number, digest in blobs if digest and memory.repository(digest) in held)
    if store == "podman":
        layers_there = {diff_id for image in images_there for diff_id in _diff_ids(image)}
        return frozenset(number for number, layer in enumerate(wanted) if layer and layer.diff_id in layers_there)
    diff_ids = [layer.diff_id for layer in itertools.takewhile(bool, wanted) if layer]
    return frozenset(range(max((_common(diff_ids, _diff_ids(image)) for image in images_there), default=0)))


def _common(wanted: Sequence[str], there: Sequence[str]) -> int:
    pairs = zip(wanted, there, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _inspected(engine: docker.DockerClient, filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The images there that the filters name, and when each was made, in seconds since 1970.

    One that is removed meanwhile is left out.
    """
    import docker.errors

    for image in engine.api.images(filters=filters):
        with contextlib.suppress(docker.errors.ImageNotFound):
            yield {**engine.api.inspect_image(image["Id"]), "CreatedSeconds": image["Created"]}


def _steps(plan: ImagePlan, held: frozenset[int]) -> Iterator[int]:
    """With how many of the model's layers each load ends, but for the last, which ends with all."""
    unsent = 0
    for number, layer in enumerate(plan.layers):
        if len(plan.base_layers) + number in held:
            continue
        if unsent >= STEP_BYTES:
            yield number
            unsent = 0
        unsent += layer.size


def _remove_unfinished(engine: docker.DockerClient, finished: Sequence[str]) -> None:
    """Remove the images that earlier steps left: those of the finished image's own layers, and those that are old.

    The first are the finished image's from now on, so a bake beside this one that counts on them still finds them.
    """
    import docker.errors

    for image in _inspected(engine, {"label": UNFINISHED, "dangling": True}):
        layers = _diff_ids(image)
        if layers == list(finished[: len(layers)]) or image["CreatedSeconds"] < time.time() - UNFINISHED_SECONDS:
            with contextlib.suppress(docker.errors.APIError):  # somebody uses it, or removed it first
                engine.api.remove_image(image["Id"], noprune=True)


def _unfinished(config: bytes) -> bytes:
    """The config of an image that only keeps its layers in the engine; as of now, and so no other bake's.

    Its history is not how the whole image's begins: podman would take it for that one's parent, and keep it.
    """
    value = json.loads(config)
    settings = {**value["config"], "Labels": {UNFINISHED: "weightctl bake removes it when it is done"}}
    created = datetime.now(timezone.utc).isoformat()
    return json.dumps({**value, "config": settings, "created": created, "history": []}).encode()


def _load(engine: docker.DockerClient, write: Callable[[BinaryIO], None]) -> None:
    """Have the engine load an archive that is written while it is sent."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with ThreadPoolExecutor(1) as pool, os.fdopen(reader, "rb", buffering=0) as source:

        def fill() -> None:
            with os.fdopen(writer, "wb", buffering=0) as stream:
                write(stream)

        making = pool.submit(fill)

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
        making.result()


def _write_archive(
    plan: ImagePlan,
    name: ImageName | None,
    held: frozenset[int],
    written: list[WrittenLayer],
    oci: bool,
    task: Task,
    stream: BinaryIO,
) -> None:
    """The image in Docker's form, without the layers that the engine holds; with `oci` also as a layout.

    Adds the model's layers to `written`, which has those of the steps before. Without a name the image is not finished.
    The containerd image store takes the layout's word for what the image is, and finds in its own store the blobs that
    are not sent; it goes by their bytes, whatever the members' names.
    """
    below = plan.base_layers
    tar = TarWriter(stream)
    for number, base_layer in enumerate(below):
        if number not in held:
            with tar.member(_member(number), base_layer.blob.size):
                copy_blob(plan.open_base_blob(base_layer.blob), base_layer.blob, [tar.write], task)
    for layer in plan.layers[len(written) :]:
        if (number := len(below) + len(written)) in held:
            written.append(known_layer(layer, task))
            continue
        with tar.member(_member(number), layer.size):
            written.append(write_layer(layer, [tar.write], task))
    config = plan.config(written) if name else _unfinished(plan.config(written))
    tar.add("config.json", config)
    if oci and name:
        manifest = plan.manifest(Descriptor.of(CONFIG, config), written)
        tar.add("manifest", manifest)
        tar.add_json("index.json", image_index(Descriptor.of(MANIFEST, manifest), name, plan.platform))
        tar.add_json("oci-layout", {"imageLayoutVersion": "1.0.0"})
    else:
        for number in held:
            tar.add(_member(number), b"")  # podman looks for a member even where it has the layer
        members = [_member(number) for number in range(plan.count)]
        tar.add_json("manifest.json", docker_manifest("config.json", name, members))
    tar.close()


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
        media_type = next((kind for magic, kind in MAGIC.items() if stream.peek(4).startswith(magic)), LAYER)
    (read,) = hash_files([File("layer", path.stat().st_size, path)], 1, None, Progress())
    blob = Descriptor(media_type, f"sha256:{read.sha256}", read.size)
    return WrittenLayer(blob, diff_id), path


def _not_sent(blob: Descriptor) -> BinaryIO:
    raise WeightctlError(f"the engine has lost the layer {blob.digest} of the base", "pull the base image again")


def _open_saved(paths: dict[str, Path], blob: Descriptor) -> BinaryIO:
    return paths[blob.digest].open("rb")
