"""Sending an image to an engine: which layers go together, and the archive that it loads while that is written."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING, BinaryIO

from weightctl.errors import IntegrityError, translated_os_errors
from weightctl.images.archive import TarWriter, docker_manifest
from weightctl.images.engine import PIPE_BYTES, Engine, diff_ids, refusal
from weightctl.images.layers import LayerPlan, copy_blob, known_layer, write_layer
from weightctl.images.oci import CONFIG, MANIFEST, Descriptor, ImageName, WrittenLayer, image_index
from weightctl.images.plan import ImagePlan
from weightctl.progress import Task

if TYPE_CHECKING:
    import docker

STEP_BYTES = 1 << 30
"""After so much a load ends with the layer: an engine keeps nothing of a load that a kill breaks off."""

UNFINISHED = "weightctl.unfinished"
"""The label of the images that keep what a bake has brought so far, until it is done."""

UNFINISHED_SECONDS = 24 * 3600
"""How long they are kept for whoever bakes the same again."""


def steps(plan: ImagePlan, held: frozenset[int]) -> Iterator[int]:
    """With how many of the model's layers each load ends, but for the last, which ends with all."""
    unsent = 0
    for number, layer in enumerate(plan.layers):
        if len(plan.base_layers) + number in held:
            continue
        if unsent >= STEP_BYTES:
            yield number
            unsent = 0
        unsent += layer.size


def send(
    engine: Engine,
    plan: ImagePlan,
    name: ImageName | None,
    held: frozenset[int],
    written: list[WrittenLayer],
    task: Task,
) -> None:
    """Have the engine load the image, without the layers that it holds. Without a name the image is not finished.

    Adds the model's layers to `written`, which has those of the steps before. Raises WeightctlError if the engine
    refuses, IntegrityError if a file's bytes are not what its source claims.
    """
    write = functools.partial(_write_archive, plan, name, held, written, engine.store == "containerd", task)
    image = _load(engine.api, write)
    engine.remember((*plan.base_layers, *written), image)


def remove_unfinished(engine: Engine, finished: Sequence[str]) -> None:
    """Remove the images that earlier steps left: those of the finished image's own layers, and those that are old.

    The first are the finished image's from now on, so a bake beside this one that counts on them still finds them.
    """
    import docker.errors

    for image in engine.images({"label": UNFINISHED, "dangling": True}):
        layers = diff_ids(image)
        if layers == list(finished[: len(layers)]) or image["CreatedSeconds"] < time.time() - UNFINISHED_SECONDS:
            with contextlib.suppress(docker.errors.APIError):  # somebody uses it, or removed it first
                engine.api.remove_image(image["Id"], noprune=True)


def _load(api: docker.APIClient, write: Callable[[BinaryIO], str]) -> str:
    """Have the engine load an archive that is written while it is sent. Returns what `write` returns."""
    reader, writer = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with ThreadPoolExecutor(1) as pool, os.fdopen(reader, "rb", buffering=0) as source:

        def fill() -> str:
            # An OSError of the model's files must not be taken for one of the connection.
            with os.fdopen(writer, "wb", buffering=0) as stream, translated_os_errors("send the image"):
                return write(stream)

        making = pool.submit(fill)

        def blocks() -> Iterator[bytes]:
            while block := source.read(PIPE_BYTES):
                yield block
            making.result()  # what broke the archive off breaks the request off: the engine then keeps nothing

        try:
            for message in api.load_image(blocks(), quiet=False):
                if "error" in message:
                    raise refusal(str(message["error"]))
        finally:
            source.close()  # a writer that still waits ends with a broken pipe
        return making.result()


def _write_archive(
    plan: ImagePlan,
    name: ImageName | None,
    held: frozenset[int],
    written: list[WrittenLayer],
    oci: bool,
    task: Task,
    stream: BinaryIO,
) -> str:
    """The image in Docker's form, or with `oci` as a layout, without the layers that the engine holds. Returns its ID.

    The containerd image store takes the layout's word for what the image is, and finds in its own store the blobs that
    are not sent. Where a load broke off it goes on with the member of the same name, whoever's bytes those were: every
    load has names of its own.
    """
    below, load = plan.base_layers, secrets.token_hex(8)
    members = [f"{load}/{number}.tar" for number in range(plan.count)]
    tar = TarWriter(stream)
    for number, base_layer in enumerate(below):
        if number not in held:
            with tar.member(members[number], base_layer.blob.size):
                copy_blob(plan.open_base_blob(base_layer.blob), base_layer.blob, [tar.write], task)
    for layer in plan.layers[len(written) :]:
        if (number := len(below) + len(written)) in held:
            written.append(known_layer(layer, task))
        else:
            written.append(_write_member(tar, members[number], layer, task))
    config = plan.config(written) if name else _unfinished(plan.config(written))
    tar.add(f"{load}/config.json", config)
    image = Descriptor.of(CONFIG, config)
    if oci:
        manifest = plan.manifest(image, written)
        image = Descriptor.of(MANIFEST, manifest)
        tar.add(f"{load}/manifest.json", manifest)
        tar.add_json("index.json", image_index(image, name, plan.platform))
        tar.add_json("oci-layout", {"imageLayoutVersion": "1.0.0"})
    else:
        for number in held:
            tar.add(members[number], b"")  # podman looks for a member even where it has the layer
        tar.add_json("manifest.json", docker_manifest(f"{load}/config.json", name, members))
    tar.close()
    return image.digest


def _write_member(tar: TarWriter, name: str, layer: LayerPlan, task: Task) -> WrittenLayer:
    """A layer as a member, whose size stands before it: a compressed layer is made once for that, and once to be sent.

    Raises IntegrityError if its files change in between.
    """
    size = layer.size if layer.compression == "none" else known_layer(layer, Task()).blob.size
    with tar.member(name, size):
        written = write_layer(layer, [tar.write], task)
    if written.blob.size != size:
        raise IntegrityError(f"{layer.files[0].source} changed while it was read", "run this when nothing writes it")
    return written


def _unfinished(config: bytes) -> bytes:
    """The config of an image that only keeps its layers in the engine; as of now, and so no other bake's.

    Its history is not how the whole image's begins: podman would take it for that one's parent, and keep it.
    """
    value = json.loads(config)
    settings = {**value["config"], "Labels": {UNFINISHED: "weightctl bake removes it when it is done"}}
    created = datetime.now(timezone.utc).isoformat()
    return json.dumps({**value, "config": settings, "created": created, "history": []}).encode()
