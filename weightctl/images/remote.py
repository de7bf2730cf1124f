"""A registry: images pushed to it without an engine, images in it as bases, and checked where they are."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.images.base import Baked, Images, Preview, describe, images
from weightctl.images.bases import base_image, choose, descriptor, index_entries, is_runnable
from weightctl.images.contents import check_image
from weightctl.images.layers import LayerPlan, known_layer, open_layer, remembered_layer
from weightctl.images.oci import (
    CONFIG,
    DIGEST,
    MANIFEST,
    MAX_JSON_BYTES,
    BaseImage,
    Descriptor,
    ImageName,
    WrittenLayer,
)
from weightctl.images.plan import ImagePlan
from weightctl.images.registry_client import RegistryClient
from weightctl.images.uploads import Memory, Upload
from weightctl.model import Snapshot
from weightctl.progress import Progress, Task

LAYER_CAPS = {
    r"ghcr\.io": 10 * 10**9,
    r"\d+\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com(\.cn)?": 52_000 << 20,
    r"public\.ecr\.aws": 10_000 << 20,
}
"""The largest layer that a registry takes, in bytes, as its documentation says: GitHub's "working with the container
registry"; Amazon's "ECR service quotas" and "ECR Public service quotas"."""


@images.register("registry")
class RemoteImages(Images):
    """The registry that an image's own name names."""

    summary = "a registry, without an engine: --to registry"

    def __init__(self, location: str = "") -> None:
        """`location` is the image to read, `NAME[:TAG][@DIGEST]`. What is baked goes where its tag says."""
        name, _, digest = location.partition("@")
        if digest and not DIGEST.fullmatch(digest):
            raise UsageError(f"not a digest: {digest!r}", "write NAME@sha256:…")
        self._location = location
        self._name = ImageName.parse(name) if location else None
        self._reference = digest or (self._name.tag if self._name else "")

    def preview(self, plan: ImagePlan, name: ImageName, *, config: Config) -> Preview:
        """See `Images.preview`."""
        client = self._writer(name, config)
        problems = tuple(_cap_problems(client.registry, plan))
        known = [remembered_layer(layer) for layer in plan.layers]
        existing = storage.in_parallel(
            lambda layer: layer is not None and client.has_blob(layer.blob), known, config.workers
        )
        return Preview(tuple(existing), 0, problems)

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """See `Images.bake`. Blobs that are there are not sent; the tag moves last."""
        client = self._writer(name, config)
        before = client.manifest(name.tag)
        push = _Push(client, plan)
        with (
            translated_os_errors("read the model"),
            progress.task("hashing", plan.size) as hashing,
            progress.task("sending", plan.size + sum(blob.size for blob in plan.base_blobs)) as sending,
        ):
            storage.in_parallel(lambda blob: push.base_blob(blob, sending), plan.base_blobs, config.workers)
            layers = storage.in_parallel(lambda layer: push.layer(layer, hashing, sending), plan.layers, config.workers)
        written = [layer for layer, _ in layers]
        image_config = plan.config(written)
        push.blob(Descriptor.of(CONFIG, image_config), lambda: io.BytesIO(image_config), Task())
        manifest = plan.manifest(Descriptor.of(CONFIG, image_config), written)
        if before is None or before[1] != manifest:
            client.put_manifest(name.tag, manifest)
            push.sent_bytes.append(len(manifest))
        push.remember()
        return Baked(Descriptor.of(MANIFEST, manifest).digest, describe(plan.layers, layers), sum(push.sent_bytes))

    def check(self, against: Snapshot | None = None, *, config: Config, progress: Progress) -> Check:
        """See `Images.check`. Of an image for several platforms, all of them; attestations hold no model."""
        client, found, manifest = self._open(config)
        checks = [Check(0, 0, ())]
        for blob, value, runnable in _images(client, found, manifest):
            try:
                settings = descriptor(value["config"])
                image = base_image(f"{client}@{blob.digest}", value, _read_config(client, settings), client.open_blob)
            except (IntegrityError, KeyError, TypeError) as error:
                checks.append(Check(1, blob.size, (f"the image {blob.digest} is malformed: {error}",)))
                continue
            model = against if runnable else None
            layers = check_image(image, model, workers=config.workers, progress=progress)
            own = layers.bytes + blob.size + settings.size
            checks.append(dataclasses.replace(layers, files=layers.files + 2, bytes=own))
        problems = tuple(dict.fromkeys(problem for check in checks for problem in check.problems))
        return Check(sum(check.files for check in checks), sum(check.bytes for check in checks), problems)

    def open_base(self, platform: str | None, *, config: Config) -> BaseImage:
        """The image, for `platform`, which may be None where it is plain which is meant.

        Raises UsageError if there is none, or several; IntegrityError if what the registry gives contradicts itself.
        """
        client, _, manifest = self._open(config)
        what = str(self._location)
        if "manifests" in manifest:
            chosen = descriptor(choose(index_entries(manifest, what), platform, what))
            manifest = _parse(_manifest(client, chosen.digest)[1], what)
        settings = _read_config(client, descriptor(manifest.get("config")))
        return base_image(what, manifest, settings, client.open_blob, self._name)

    def _writer(self, name: ImageName, config: Config) -> RegistryClient:
        if self._name is not None:
            raise UsageError(f"--to registry:{self._location}: the tag alone says where to", "write --to registry")
        return RegistryClient(name, actions="pull,push", plain_http=config.plain_http)

    def _open(self, config: Config) -> tuple[RegistryClient, Descriptor, dict[str, Any]]:
        """The image's manifest or index, and a client of its repository."""
        if self._name is None:
            raise UsageError("registry: names no image", "write registry:NAME[:TAG]")
        client = RegistryClient(self._name, actions="pull", plain_http=config.plain_http)
        found = client.manifest(self._reference)
        if found is None:
            raise UsageError(f"there is no image {self._location} in its registry", "check its name and tag")
        return client, found[0], _parse(found[1], self._location)


class _Push:
    """What one bake sends to one repository."""

    def __init__(self, client: RegistryClient, plan: ImagePlan) -> None:
        self.sent_bytes: list[int] = []
        self._client = client
        self._plan = plan
        self._memory = Memory(client.registry)
        self._digests: list[str] = []
        base = plan.base.repository if plan.base else None
        same = base is not None and base.canonical.partition("/")[0] == client.registry
        self._base_repository = base.canonical.partition("/")[2].rpartition(":")[0] if base and same else None

    def base_blob(self, blob: Descriptor, task: Task) -> None:
        """Mount or copy a blob of the base. The registry compares its digest."""
        self.blob(blob, lambda: self._plan.open_base_blob(blob), task, self._base_repository)

    def layer(self, plan: LayerPlan, hashing: Task, sending: Task) -> tuple[WrittenLayer, bool]:
        """The layer in the repository, and whether it was there already or could be mounted."""
        layer = known_layer(plan, hashing)
        return layer, not self.blob(layer.blob, lambda: open_layer(plan), sending)

    def blob(
        self, blob: Descriptor, open_source: Callable[[], BinaryIO], task: Task, mount_from: str | None = None
    ) -> int:
        """Bring a blob into the repository; how many bytes that took."""
        mount_from = mount_from or self._memory.repository(blob.digest)
        with self._memory.upload(self._client.repository, blob.digest) as record:
            upload = Upload(self._client, blob, open_source, record, task)
            upload.run(mount_from if mount_from != self._client.repository else None)
        self.sent_bytes.append(upload.sent_bytes)
        self._digests.append(blob.digest)
        return upload.sent_bytes

    def remember(self) -> None:
        """The image is complete: its repository keeps the blobs from now on."""
        for digest in self._digests:
            self._memory.remember(digest, self._client.repository)


def _cap_problems(registry: str, plan: ImagePlan) -> Iterator[str]:
    cap = next((cap for pattern, cap in LAYER_CAPS.items() if re.fullmatch(pattern, registry)), None)
    for layer in plan.layers:
        if cap is not None and layer.size > cap:
            largest = max(layer.files, key=lambda file: file.size)
            remedy = (
                "no layer can hold it: save the model in smaller shards, or choose another registry"
                if largest.size > cap
                else "fewer layers in the base leave more for the weights"
            )
            yield f"{largest.path} makes a layer of {layer.size} bytes, and {registry} takes {cap} at most; {remedy}"


def _manifest(client: RegistryClient, digest: str) -> tuple[Descriptor, bytes]:
    found = client.manifest(digest)
    if found is None:
        raise IntegrityError(f"{client} lacks the manifest {digest}")
    return found


def _images(
    client: RegistryClient, found: Descriptor, manifest: dict[str, Any]
) -> Iterator[tuple[Descriptor, dict[str, Any], bool]]:
    """The manifest of all that an index lists, or the one that there is, and whether that is an image."""
    if "manifests" not in manifest:
        yield found, manifest, True
        return
    for entry in index_entries(manifest, str(client)):
        blob, content = _manifest(client, descriptor(entry).digest)
        yield blob, _parse(content, blob.digest), is_runnable(entry)


def _parse(content: bytes, what: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        if isinstance(value, dict) and ("manifests" in value or {"config", "layers"} <= value.keys()):
            return value
        if isinstance(value, dict) and value.get("schemaVersion") == 1:
            raise UsageError(f"{what} is in a format of before 2017", "pull it and push it again with today's tools")
    raise IntegrityError(f"{what} has no manifest that can be read")


def _read_config(client: RegistryClient, blob: Descriptor) -> dict[str, Any]:
    """An image config, compared with its digest."""
    if blob.size > MAX_JSON_BYTES:
        raise IntegrityError(f"the config {blob.digest} in {client} is said to have {blob.size} bytes")
    with client.open_blob(blob) as source:
        content = b"".join(iter(lambda: source.read(1 << 20), b""))
    if Descriptor.of("", content) != Descriptor("", blob.digest, blob.size):
        raise IntegrityError(f"the config {blob.digest} in {client} has other bytes")
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(content), dict):
            return value
    raise IntegrityError(f"the config {blob.digest} in {client} is no JSON object")
