"""An OCI image layout: a directory that skopeo, podman, umoci and containerd read, and registries copy from."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightctl import storage
from weightctl.config import Config, expanded
from weightctl.digests import Check, DigestCache, check_against, check_files
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.images.base import Baked, Images, Preview, describe, images
from weightctl.images.bases import base_image, choose, descriptor, index_entries
from weightctl.images.contents import check_image
from weightctl.images.layers import LayerPlan, copy_blob, remembered_layer, write_layer
from weightctl.images.oci import (
    CONFIG,
    DIGEST,
    INDEX,
    LAYER,
    MANIFEST,
    MAX_JSON_BYTES,
    NAME_ANNOTATION,
    TAG_ANNOTATION,
    BaseImage,
    Descriptor,
    ImageName,
    WrittenLayer,
    index_entry,
)
from weightctl.images.plan import ImagePlan
from weightctl.model import File, Snapshot
from weightctl.progress import Progress, Task

PATIENCE_SECONDS = 1
"""How long one waits for another bake into the same layout without saying so."""


@images.register("layout")
class LayoutImages(Images):
    """A directory with `oci-layout`, `index.json` and `blobs/`."""

    summary = "an OCI image layout: --to layout:DIR"

    def __init__(self, location: str) -> None:
        if not location:
            raise UsageError("--to layout: needs a directory", "write --to layout:DIR")
        self.path = expanded(location).absolute()
        self._blobs = self.path / "blobs" / "sha256"
        self._staging = self.path / ".weightctl"

    def preview(self, plan: ImagePlan, name: ImageName, *, config: Config) -> Preview:  # noqa: ARG002
        """See `Images.preview`."""
        with translated_os_errors(f"read the image layout {self.path}"):
            existing = tuple(self._may_hold(layer) for layer in plan.layers)
            needed = sum(layer.size for layer, there in zip(plan.layers, existing, strict=True) if not there)
            needed += sum(blob.size for blob in plan.base_blobs if not self._has_size(blob.digest, blob.size))
        return Preview(existing, needed)

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """See `Images.bake`. A blob that is there already is not written again."""
        with translated_os_errors(f"write the image layout {self.path}"), self._writing(progress):
            unknown = self._unknown_sizes(plan)  # taken now: a shard just written has the size of those that follow
            new = [layer for layer in plan.layers if layer.size not in unknown]
            new = [layer for layer in new if not self._may_hold(layer)]
            storage.check_space(self.path, sum(layer.size for layer in new))
            with progress.task("baking", sum(file.size for layer in plan.layers for file in layer.files)) as task:
                copied = storage.in_parallel(
                    lambda blob: self._copy_base_blob(plan, blob), plan.base_blobs, config.workers
                )
                layers = storage.in_parallel(
                    lambda layer: self._write_layer(layer, unknown, task), plan.layers, config.workers
                )
            written = [layer for layer, _ in layers]
            image_config = plan.config(written)
            manifest = plan.manifest(Descriptor.of(CONFIG, image_config), written)
            new_bytes = sum(copied) + sum(layer.blob.size for layer, reused in layers if not reused)
            new_bytes += sum(self._write_small(content) for content in (image_config, manifest))
            replaced = self._name(Descriptor.of(MANIFEST, manifest), name, plan.platform)
            if gone := self._only_reachable_from(replaced):
                for digest in gone:
                    self.blob(digest).unlink(missing_ok=True)
                progress.note(f"removed what only the image that was {name} before needed: {len(gone)} blobs")
        return Baked(Descriptor.of(MANIFEST, manifest).digest, describe(plan.layers, layers), new_bytes)

    def check(self, against: Snapshot | None = None, *, config: Config, progress: Progress) -> Check:
        """See `Images.check`."""
        self._require_layout()
        blobs: dict[str, File] = {}
        problems = [] if (self.path / "index.json").exists() else ["index.json is missing"]
        for entry in self._read_index()["manifests"]:
            try:
                self._list_image(entry, blobs, problems)
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, IntegrityError) as error:
                problems.append(f"the manifest {entry['digest']} is malformed: {error!r}")
        found = check_against(blobs.values(), config.workers, progress)
        if against is not None and not found.problems:
            for entry in self._read_index()["manifests"]:
                image = self._open_image(entry, None, f"layout:{self.path}")
                problems += check_image(image, against, workers=config.workers, progress=progress).problems
        return dataclasses.replace(found, problems=(*found.problems, *problems))

    def _require_layout(self) -> None:
        if not (self.path / "oci-layout").is_file():
            raise UsageError(f"{self.path} is no OCI image layout", "it has no file 'oci-layout'")

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

    def open_base(self, tag: str | None, platform: str | None) -> BaseImage:
        """An image of the layout; `tag` and `platform` may be None where it is plain which is meant."""
        self._require_layout()
        what = f"layout:{self.path}" + (f"#{tag}" if tag else "")
        entries = self._read_index()["manifests"]
        tagged = [entry for entry in entries if tag in (None, _tag(entry))]
        if not tagged:
            known = ", ".join(filter(None, map(_tag, entries))) or "none"
            raise UsageError(f"there is no image {what}", f"its tags: {known}")
        return self._open_image(choose(tagged, platform, what), platform, what)

    def _open_image(self, entry: Any, platform: str | None, what: str) -> BaseImage:
        manifest = self._read_json(entry)
        if "manifests" in manifest:
            manifest = self._read_json(choose(index_entries(manifest, what), platform, what))
        config = self._read_json(manifest.get("config"))
        return base_image(what, manifest, config, lambda blob: self.blob(blob.digest).open("rb", buffering=0))

    def _read_json(self, entry: Any) -> dict[str, Any]:
        value = self._read_json_blob(descriptor(entry).to_json(), {})
        if value is None:
            raise IntegrityError(f"a blob of {self.path} is missing or damaged: {entry['digest']}")
        return value

    @contextmanager
    def _writing(self, progress: Progress) -> Iterator[None]:
        """Alone in a directory that is a layout, or becomes one."""
        marker = self.path / "oci-layout"
        if not marker.exists() and self.path.exists():
            strangers = {path.name for path in self.path.iterdir()} - {self._staging.name, "blobs"}
            if strangers:
                raise UsageError(f"{self.path} is not empty and is no OCI layout", "choose another directory")
        for directory in (self._blobs, self._staging):
            storage.make_directories(directory)
        with self._lock(progress):
            storage.sweep_temporaries(self._staging)
            self._read_index()  # a damaged one ends this before the work, not after it
            if not marker.exists():
                self._write_json(marker, {"imageLayoutVersion": "1.0.0"})
            yield

    @contextmanager
    def _lock(self, progress: Progress) -> Iterator[None]:
        note = f"waiting for another bake into {self.path} to end"
        waiting = threading.Timer(PATIENCE_SECONDS, progress.note, (note,))
        waiting.start()
        try:
            with storage.lock(self._staging / "lock"):
                waiting.cancel()
                yield
        finally:
            waiting.cancel()

    def _write_json(self, path: Path, value: object) -> None:
        content = json.dumps(value, indent=2).encode()
        if not path.exists() or path.read_bytes() != content:
            with storage.atomic_write(path, self._staging) as stream:
                storage.write_all(stream)(memoryview(content))

    def blob(self, digest: str) -> Path:
        """Where a blob lies."""
        return self._blobs / digest.removeprefix("sha256:")

    def _may_hold(self, layer: LayerPlan) -> bool:
        """Whether a blob lies where the layer's would, as far as can be told without reading either."""
        known = remembered_layer(layer)
        return known is not None and self._has_size(known.blob.digest, known.blob.size)

    def _has_size(self, digest: str, size: int) -> bool:
        return self.blob(digest).is_file() and self.blob(digest).stat().st_size == size

    def _holds(self, digest: str, size: int) -> bool:
        """Whether the blob is there with the right bytes (read again, unless it has not changed since it last was)."""
        if not self._has_size(digest, size):
            return False
        blob = File(digest, size, self.blob(digest), sha256=digest.removeprefix("sha256:"))
        _, damaged = check_files([blob], 1, DigestCache(), Progress())
        return not damaged

    def _write_layer(self, layer: LayerPlan, unknown: set[int], task: Task) -> tuple[WrittenLayer, bool]:
        """The layer's blob, and whether it was there already."""
        size = sum(file.size for file in layer.files)
        known = remembered_layer(layer)
        if known is None and layer.size in unknown and layer.compression == "none":
            known = write_layer(layer, [], task)
            task.advance(-size)
        if known is not None and self._holds(known.blob.digest, known.blob.size):
            task.advance(size)
            return known, True
        with storage.staged_file(self._staging) as staged:
            written = write_layer(layer, [storage.write_all(staged.stream)], task)
            staged.publish(self.blob(written.blob.digest))
        return written, False

    def _copy_base_blob(self, plan: ImagePlan, blob: Descriptor) -> int:
        """How many bytes it took to have the base's blob."""
        if self._holds(blob.digest, blob.size):
            return 0
        with storage.staged_file(self._staging) as staged:
            copy_blob(plan.open_base_blob(blob), blob, [storage.write_all(staged.stream)], Task())
            staged.publish(self.blob(blob.digest))
        return blob.size

    def _unknown_sizes(self, plan: ImagePlan) -> set[int]:
        """Sizes of the blobs that may be layers of the plan: hashing one of such a size first may save writing it."""
        known = {self.blob(layer.blob.digest) for layer in map(remembered_layer, plan.layers) if layer}
        return {path.stat().st_size for path in self._blobs.iterdir() if path not in known}

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

    def _name(self, manifest: Descriptor, name: ImageName, platform: str) -> list[dict[str, Any]]:
        """Let the name mean this image, and no other; so does its tag alone, which is all that most tools look at.

        Returns the entries that had the name before.
        """
        index = self._read_index()
        others, replaced = [], []
        for entry in index["manifests"]:
            annotations = entry.get("annotations") or {}
            full, tag = annotations.get(NAME_ANNOTATION), annotations.get(TAG_ANNOTATION)
            if full == name.canonical or (full is None and tag == name.tag):
                replaced.append(entry)
                continue
            others.append({**entry, "annotations": {**annotations, TAG_ANNOTATION: full}} if tag == name.tag else entry)
        entry = index_entry(manifest, name, platform)
        self._write_json(self.path / "index.json", {**index, "manifests": [*others, entry]})
        return replaced

    def _only_reachable_from(self, entries: list[dict[str, Any]]) -> set[str]:
        """The blobs to which these entries led, and none that is in the index now; none at all where that is unsure.

        What no image has led to yet stays: a bake that was killed, or another tool's, may go on with it.
        """
        try:
            return self._reachable(entries) - self._reachable(self._read_index()["manifests"])
        except (IntegrityError, LookupError, RecursionError, TypeError, ValueError):
            return set()

    def _reachable(self, entries: list[dict[str, Any]]) -> set[str]:
        """The digests of all blobs that the entries of an index lead to. Raises IntegrityError if one is unreadable."""
        found: set[str] = set()
        waiting = [*entries]
        while waiting:
            entry = waiting.pop()
            if descriptor(entry).digest not in found:
                content = self._read_json(entry)
                blobs = [entry, *content.get("layers", []), *([content["config"]] if "config" in content else [])]
                found |= {descriptor(blob).digest for blob in blobs}
                waiting += content.get("manifests", [])
        return found


def _tag(entry: dict[str, Any]) -> str | None:
    tag = (entry.get("annotations") or {}).get(TAG_ANNOTATION)
    return tag if isinstance(tag, str) else None
