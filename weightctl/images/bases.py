"""Reading an image that the model's layers are put on: which platform, which layers, which config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from weightctl.errors import IntegrityError, UsageError
from weightctl.images.oci import DIGEST, LAYER, LAYER_GZIP, BaseImage, Descriptor, ImageName, WrittenLayer

Json = Mapping[str, Any]


def descriptor(value: Any) -> Descriptor:
    """A descriptor as a manifest or index holds it. Raises IntegrityError if it is none."""
    try:
        found = Descriptor(str(value["mediaType"]), str(value["digest"]), int(value["size"]))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise IntegrityError(f"not a descriptor: {json.dumps(value, default=str)[:200]}") from error
    if not DIGEST.fullmatch(found.digest) or found.size < 0:
        raise IntegrityError(f"not a descriptor of a sha256 blob: {found.digest[:100]!r}, {found.size} bytes")
    return found


def index_entries(index: Json, what: str) -> Sequence[Json]:
    """The manifests that an index lists. Raises IntegrityError if they are no objects."""
    entries = index.get("manifests")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise IntegrityError(f"the index of {what} is malformed: it lists {json.dumps(entries)[:200]}", _DAMAGED)
    return entries


def choose(entries: Sequence[Json], platform: str | None, what: str) -> Json:
    """The entry of an index that is for `platform`; None is enough where only one image is meant.

    Entries for no platform (attestations) do not count. Raises UsageError, listing the platforms there are.
    """
    runnable = [(entry, _platform(entry.get("platform"))) for entry in entries if is_runnable(entry)]
    wanted = [entry for entry, name in runnable if not (platform and name) or same_platform(platform, name)]
    if len(wanted) == 1:
        return wanted[0]
    known = ", ".join(sorted({name or "not said" for _, name in runnable})) or "none"
    if platform is None:
        raise UsageError(f"{what} is for several platforms", f"choose one with --platform: {known}")
    raise UsageError(f"{what} has {'several images' if wanted else 'no image'} for {platform}", f"it is for: {known}")


def is_runnable(entry: Json) -> bool:
    """Whether an index lists an image there, and not what somebody attests of one."""
    return not _platform(entry.get("platform")).startswith("unknown/")


def _platform(value: Any) -> str:
    if not isinstance(value, dict):
        return ""
    parts = (value.get("os"), value.get("architecture"), value.get("variant"))
    return "/".join(str(part) for part in parts if part)


def base_image(
    name: str,
    manifest: Json,
    config: Json,
    open_blob: Callable[[Descriptor], BinaryIO],
    repository: ImageName | None = None,
) -> BaseImage:
    """The image that a manifest and its config describe. Raises IntegrityError if they do not fit together."""
    try:
        blobs = [_as_oci(descriptor(layer)) for layer in manifest["layers"]]
        diff_ids = [str(diff_id) for diff_id in config["rootfs"]["diff_ids"]]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"the manifest or the config of {name} is malformed: {error!r}", _DAMAGED) from error
    if wrong := _wrong_field(config):
        raise IntegrityError(f"the config of {name} is malformed: its {wrong} is not what it should be", _DAMAGED)
    if len(blobs) != len(diff_ids):
        raise IntegrityError(f"{name} has {len(blobs)} layers, its config lists {len(diff_ids)}", _DAMAGED)
    layers = tuple(WrittenLayer(blob, diff_id) for blob, diff_id in zip(blobs, diff_ids, strict=True))
    return BaseImage(name, config, layers, open_blob, repository)


DOCKER_LAYERS = {
    "application/vnd.docker.image.rootfs.diff.tar": LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": LAYER_GZIP,
}
"""Docker's names for the same bytes: an OCI manifest, which ours is, names them in OCI's way."""


def _as_oci(blob: Descriptor) -> Descriptor:
    return dataclasses.replace(blob, media_type=DOCKER_LAYERS.get(blob.media_type, blob.media_type))


_DAMAGED = "it was damaged or never an image: make it again, or name another one"


def _wrong_field(config: Json) -> str | None:
    """The first field of an image config that is of another type than its specification says."""
    settings = config.get("config") or {}
    variables = settings.get("Env") or [] if isinstance(settings, dict) else None
    right = {
        "config": isinstance(settings, dict),
        "Env": isinstance(variables, list) and all(isinstance(variable, str) for variable in variables),
        "history": isinstance(config.get("history") or [], list),
        **{field: isinstance(config.get(field) or "", str) for field in ("os", "architecture", "variant")},
    }
    return next((field for field, well in right.items() if not well), None)


VARIANTS = {"amd64/v1": "amd64", "arm64/v8": "arm64", "arm64/8": "arm64", "arm": "arm/v7", "arm/7": "arm/v7"}
"""Machines that go by another name, as containerd reads them (`platforms/database.go`)."""


def same_platform(one: str, other: str) -> bool:
    """Whether two platforms are one: `linux/arm64` and `linux/arm64/v8` are, and so are `linux/arm` and its v7."""
    return _normal(one) == _normal(other)


def _normal(platform: str) -> tuple[str, str]:
    os_name, _, machine = platform.partition("/")
    return os_name, VARIANTS.get(machine, machine)


def platform_of(base: BaseImage) -> str:
    """What a base says it is for; what it does not say is what most are for."""
    said = {field: base.config.get(field) for field in ("os", "architecture", "variant")}
    return _platform({**said, "os": said["os"] or "linux", "architecture": said["architecture"] or "amd64"})
