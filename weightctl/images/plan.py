"""An image to be: which layers, and what its config and manifest say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, BinaryIO

from weightctl.errors import UsageError
from weightctl.images.layers import LayerPlan
from weightctl.images.oci import MANIFEST, BaseImage, Descriptor, WrittenLayer
from weightctl.model import File, Snapshot

MAX_LAYERS = 120
"""Docker 20.10 takes 125 layers and refuses more ("max depth exceeded"); some are left for whoever builds on top."""

MODEL_DIRECTORY_VARIABLE = "WEIGHTCTL_MODEL_DIR"
"""Says in the image's environment where its model is."""

CREATED = "org.opencontainers.image.created"
"""The annotation that says when."""


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
    def count(self) -> int:
        """Of all layers, the base's and the model's."""
        return len(self.base_layers) + len(self.layers)

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


def _contents(layer: LayerPlan) -> str:
    return layer.files[0].path if len(layer.files) == 1 else f"{len(layer.files)} small files"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def plan_image(
    snapshot: Snapshot,
    directory: str,
    platform: str,
    created: str | None,
    base: BaseImage | None = None,
    compression: str = "none",
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
    layers = tuple(LayerPlan(directory, files, compression) for files in groups)
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
