"""An OCI image layout: a directory that skopeo, podman, umoci and containerd read, and registries copy from."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check, DigestCache, check_against, check_files
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.images.base import Baked, Images, describe, images
from weightctl.images.oci import (
    CONFIG,
    INDEX,
    LAYER,
    MANIFEST,
    Descriptor,
    ImageName,
    ImagePlan,
    LayerPlan,
    WrittenLayer,
    plain_layer,
    write_layer,
)
from weightctl.model import File
from weightctl.progress import Progress, Task

NAME_ANNOTATION = "io.containerd.image.name"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
DIGEST = re.compile("sha256:[0-9a-f]{64}")
MAX_JSON_BYTES = 4 << 20
"""What registries commonly accept of a manifest."""


@images.register("layout")
class LayoutImages(Images):
    """A directory with `oci-layout`, `index.json` and `blobs/`."""

    summary = "an OCI image layout: --to layout:DIR"

    def __init__(self, location: str) -> None:
        if not location:
            raise UsageError("--to layout: needs a directory", "write --to layout:DIR")
        self.path = Path(location).expanduser().absolute()
        self._blobs = self.path / "blobs" / "sha256"
        self._staging = self.path / ".weightctl"

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """See `Images.bake`. A blob that is there already is not written again."""
        with translated_os_errors(f"write the image layout {self.path}"), self._writing():
            storage.check_space(self.path, sum(layer.size for layer in plan.layers if not self._may_hold(layer.size)))
            with progress.task("baking", sum(file.size for layer in plan.layers for file in layer.files)) as task:
                layers = storage.in_parallel(lambda layer: self._write_layer(layer, task), plan.layers, config.workers)
            written = [layer for layer, _ in layers]
            image_config = plan.config(written)
            manifest = plan.manifest(Descriptor.of(CONFIG, image_config), written)
            new_bytes = sum(layer.blob.size for layer, reused in layers if not reused)
            new_bytes += sum(self._write_small(content) for content in (image_config, manifest))
            self._name(Descriptor.of(MANIFEST, manifest), name, plan.platform)
        return Baked(Descriptor.of(MANIFEST, manifest).digest, describe(plan.layers, layers), new_bytes)

    def check(self, *, config: Config, progress: Progress) -> Check:
        """See `Images.check`."""
        if not (self.path / "oci-layout").is_file():
            raise UsageError(f"{self.path} is no OCI image layout", "it has no file 'oci-layout'")
        blobs: dict[str, File] = {}
        problems = [] if (self.path / "index.json").exists() else ["index.json is missing"]
        for entry in self._read_index()["manifests"]:
            try:
                self._list_image(entry, blobs, problems)
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, IntegrityError) as error:
                problems.append(f"the manifest {entry['digest']} is malformed: {error!r}")
        found = check_against(blobs.values(), config.workers, progress)
        return dataclasses.replace(found, problems=(*found.problems, *problems))

    def _list_image(self, entry: dict[str, Any], blobs: dict[str, File], problems: list[str]) -> None:
        """Add the blobs that an image, or each image of an index, is made of, and its diffIDs that are wrong."""
        if entry["digest"] in blobs or (manifest := self._read_json_blob(entry, blobs)) is None:
            return
        if "manifests" in manifest:
            for child in manifest["manifests"]:
                self._list_image(child, blobs, problems)
            return
        for layer in manifest["layers"]:
            self._expect(layer, blobs)
        config = self._read_json_blob(manifest["config"], blobs)
        if config is None or manifest["config"]["mediaType"] != CONFIG:
            return
        for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
            if layer["mediaType"] == LAYER and layer["digest"] != diff_id:
                problems.append(f"the layer {layer['digest']} has the diffID {diff_id} in the config")

    def _expect(self, descriptor: dict[str, Any], blobs: dict[str, File]) -> File:
        digest = str(descriptor["digest"])
        if not DIGEST.fullmatch(digest):
            raise IntegrityError(f"{digest!r} is no sha256 digest")
        blobs[digest] = File(digest, int(descriptor["size"]), self.blob(digest), digest.removeprefix("sha256:"))
        return blobs[digest]

    def _read_json_blob(self, descriptor: dict[str, Any], blobs: dict[str, File]) -> dict[str, Any] | None:
        """A blob's JSON object, or None if the blob is not what it should be, which reading all of them will show."""
        blob = self._expect(descriptor, blobs)
        if blob.size > MAX_JSON_BYTES or check_against([blob], 1, Progress()).problems:
            return None
        value = json.loads(blob.source.read_bytes())
        if not isinstance(value, dict):
            raise IntegrityError(f"{blob.path} is no JSON object")
        return value

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone in a directory that is a layout, or becomes one."""
        marker = self.path / "oci-layout"
        if not marker.exists() and self.path.exists():
            strangers = {path.name for path in self.path.iterdir()} - {self._staging.name, "blobs"}
            if strangers:
                raise UsageError(f"{self.path} is not empty and is no OCI layout", "choose another directory")
        for directory in (self._blobs, self._staging):
            storage.make_directories(directory)
        with storage.lock(self._staging / "lock"):
            storage.sweep_temporaries(self._staging)
            self._read_index()  # a damaged one ends this before the work, not after it
            if not marker.exists():
                self._write_json(marker, {"imageLayoutVersion": "1.0.0"})
            yield

    def _write_json(self, path: Path, value: object) -> None:
        content = json.dumps(value, indent=2).encode()
        if not path.exists() or path.read_bytes() != content:
            with storage.atomic_write(path, self._staging) as stream:
                storage.write_all(stream)(memoryview(content))

    def blob(self, digest: str) -> Path:
        """Where a blob lies."""
        return self._blobs / digest.removeprefix("sha256:")

    def existing(self, layer: LayerPlan) -> str | None:
        """The digest of a layer whose blob is there; None also if only reading the model could tell."""
        remembered = DigestCache().get(layer.key, layer.files[0].source) if len(layer.files) == 1 else None
        return remembered if remembered and self._holds(remembered, layer.size) else None

    def _holds(self, digest: str, size: int) -> bool:
        """Whether the blob is there with the right bytes (read again, unless it has not changed since it last was)."""
        blob = File(digest, size, self.blob(digest), sha256=digest.removeprefix("sha256:"))
        if not blob.source.is_file() or blob.source.stat().st_size != size:
            return False
        _, damaged = check_files([blob], 1, DigestCache(), Progress())
        return not damaged

    def _write_layer(self, layer: LayerPlan, task: Task) -> tuple[WrittenLayer, bool]:
        """The layer's blob, and whether it was there already."""
        digest = self.existing(layer)
        if digest is None and self._may_hold(layer.size):
            found = write_layer(layer, [], Task())
            digest = found if self._holds(found, layer.size) else None
        if digest is not None:
            task.advance(sum(file.size for file in layer.files))
            return plain_layer(layer, digest), True
        with storage.staged_file(self._staging) as staged:
            digest = write_layer(layer, [storage.write_all(staged.stream)], task)
            staged.publish(self.blob(digest))
        return plain_layer(layer, digest), False

    def _may_hold(self, size: int) -> bool:
        """Whether some blob has this size: then hashing the layer first may save writing it."""
        return any(path.stat().st_size == size for path in self._blobs.iterdir())

    def _write_small(self, content: bytes) -> int:
        digest = Descriptor.of("", content).digest
        if self._holds(digest, len(content)):
            return 0
        with storage.atomic_write(self.blob(digest), self._staging) as stream:
            storage.write_all(stream)(memoryview(content))
        return len(content)

    def _read_index(self) -> dict[str, Any]:
        path = self.path / "index.json"
        if not path.exists():
            return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
        with translated_os_errors(f"read {path}"):
            content = path.read_bytes()
        try:
            index: dict[str, Any] = json.loads(content)
            for entry in index["manifests"]:
                if not isinstance(entry["digest"], str) or not isinstance(entry.get("annotations") or {}, dict):
                    raise ValueError("an entry is malformed")
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise IntegrityError(f"{path} is damaged: it is no OCI image index", "choose another directory") from error
        return index

    def _name(self, manifest: Descriptor, name: ImageName, platform: str) -> None:
        """Let the name mean this image, and no other; so does its tag alone, which is all that most tools look at."""
        index = self._read_index()
        others = []
        for entry in index["manifests"]:
            annotations = entry.get("annotations") or {}
            full, tag = annotations.get(NAME_ANNOTATION), annotations.get(TAG_ANNOTATION)
            if full == name.canonical or (full is None and tag == name.tag):
                continue
            others.append({**entry, "annotations": {**annotations, TAG_ANNOTATION: full}} if tag == name.tag else entry)
        os_name, architecture, *variant = platform.split("/")
        entry = {
            **manifest.to_json(),
            "platform": {
                "os": os_name, "architecture": architecture, **({"variant": variant[0]} if variant else {}),
            },
            "annotations": {NAME_ANNOTATION: name.canonical, TAG_ANNOTATION: name.tag},
        }  # fmt: skip
        self._write_json(self.path / "index.json", {**index, "manifests": [*others, entry]})
