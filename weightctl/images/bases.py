"""Reading an image that the model's layers are put on: which platform, which layers, which config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from weightctl.errors import IntegrityError, UsageError
from weightctl.images.oci import DIGEST, BaseImage, Descriptor, ImageName, WrittenLayer

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


def choose(entries: Sequence[Json], platform: str | None, what: str) -> Json:
    """The entry of an index that is for `platform`; None is enough where only one image is meant.

    Entries for no platform (attestations) do not count. Raises UsageError, listing the platforms there are.
    """
    named = [(entry, _platform(entry.get("platform") or {})) for entry in entries]
    runnable = [(entry, name) for entry, name in named if not name.startswith("unknown/")]
    wanted = [entry for entry, name in runnable if not (platform and name) or same_platform(platform, name)]
    if len(wanted) == 1:
        return wanted[0]
    known = ", ".join(sorted({name or "not said" for _, name in runnable})) or "none"
    if platform is None:
        raise UsageError(f"{what} is for several platforms", f"choose one with --platform: {known}")
    raise UsageError(f"{what} has {'several images' if wanted else 'no image'} for {platform}", f"it is for: {known}")


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
        blobs = [descriptor(layer) for layer in manifest["layers"]]
        diff_ids = [str(diff_id) for diff_id in config["rootfs"]["diff_ids"]]
        dict(config.get("config") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{name} is no image: its manifest or config lacks {error}") from error
    if len(blobs) != len(diff_ids):
        raise IntegrityError(f"{name} has {len(blobs)} layers, its config lists {len(diff_ids)}")
    layers = tuple(WrittenLayer(blob, diff_id) for blob, diff_id in zip(blobs, diff_ids, strict=True))
    return BaseImage(name, config, layers, open_blob, repository)


VARIANTS = {"amd64/v1": "amd64", "arm64/v8": "arm64", "arm64/8": "arm64", "arm": "arm/v7", "arm/7": "arm/v7"}
"""Machines that go by another name, as containerd reads them (`platforms/database.go`)."""


def same_platform(one: str, other: str) -> bool:
    """Whether two platforms are one: `linux/arm64` and `linux/arm64/v8` are, and so are `linux/arm` and its v7."""
    return _normal(one) == _normal(other)


def _normal(platform: str) -> tuple[str, str]:
    os_name, _, machine = platform.partition("/")
    return os_name, VARIANTS.get(machine, machine)


def platform_of(base: BaseImage) -> str:
    """What a base says it is for."""
    return _platform(base.config) or "linux/amd64"
