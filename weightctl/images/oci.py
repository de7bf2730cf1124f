"""The nouns of the OCI image format: names, descriptors, images as they are read."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from weightctl.errors import UsageError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = f"{LAYER}+gzip"
LAYER_ZSTD = f"{LAYER}+zstd"

NAME_ANNOTATION = "io.containerd.image.name"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"
DIGEST = re.compile("sha256:[0-9a-f]{64}")
DOCKER_HUB = (None, "docker.io", "index.docker.io", "registry-1.docker.io")
"""What stands for Docker Hub as a name's registry."""
MAX_JSON_BYTES = 4 << 20
"""What registries commonly accept of a manifest."""

_NAME = re.compile(
    r"(?:(?P<registry>"
    r"(?:[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+|localhost|\[[a-fA-F0-9:]+\]|[a-zA-Z0-9-]+(?=:\d))(?::\d+)?)/)?"
    r"(?P<repository>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class ImageName:
    """`[registry/]repository[:tag]`, as Docker reads it."""

    registry: str | None
    repository: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ImageName:
        """Take a tag apart; `:latest` is added if there is none. Raises UsageError for what is no image name."""
        match = _NAME.fullmatch(text)
        if match is None or not _is_host(match["registry"]):
            raise UsageError(
                f"not an image name: {text!r}", "write [registry/]name[:tag], the name in lower case: llama:v1"
            )
        return cls(match["registry"], match["repository"], match["tag"] or "latest")

    def __str__(self) -> str:
        return f"{self.registry + '/' if self.registry else ''}{self.repository}:{self.tag}"

    @property
    def canonical(self) -> str:
        """In full, as engines read it: `foo` and `index.docker.io/foo` are both `docker.io/library/foo:latest`."""
        if self.registry not in DOCKER_HUB:
            return str(self)
        return f"docker.io/{'' if '/' in self.repository else 'library/'}{self.repository}:{self.tag}"


def _is_host(registry: str | None) -> bool:
    """Whether a registry can have that name: an address that is one, a port that is one, and no label too long."""
    try:
        parts = urllib.parse.urlsplit(f"//{registry or ''}")
        if parts.netloc.startswith("["):  # what is in brackets Python 3.10 takes as it is
            ipaddress.IPv6Address(parts.hostname or "")
        return parts.port != 0 and all(len(label) < 64 for label in (parts.hostname or "").split("."))
    except ValueError:
        return False


@dataclass(frozen=True)
class Descriptor:
    """A blob: what it is, its digest and its size in bytes."""

    media_type: str
    digest: str
    size: int

    @classmethod
    def of(cls, media_type: str, content: bytes) -> Descriptor:
        """The descriptor of `content`."""
        return cls(media_type, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))

    def to_json(self) -> dict[str, Any]:
        """As manifests and indexes hold it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class WrittenLayer:
    """A layer that exists: its blob, and the digest of its uncompressed tar stream."""

    blob: Descriptor
    diff_id: str


@dataclass(frozen=True)
class BaseImage:
    """An image that the model's layers are put on; its layers stay the blobs that they are."""

    name: str
    config: Mapping[str, Any]
    """Its image config, parsed."""
    layers: tuple[WrittenLayer, ...]
    open: Callable[[Descriptor], BinaryIO]
    """A blob's bytes. Raises WeightctlError if they cannot be had; whoever reads them checks the digest."""
    repository: ImageName | None = None
    """The registry's repository that holds its blobs, from which the same registry can mount them."""


def index_entry(manifest: Descriptor, name: ImageName | None, platform: str) -> dict[str, Any]:
    """How an index lists an image, so that containerd finds it by its name, if it has one, and skopeo by its tag."""
    os_name, architecture, *variant = platform.split("/")
    return {
        **manifest.to_json(),
        "platform": {"os": os_name, "architecture": architecture, **({"variant": variant[0]} if variant else {})},
        **({"annotations": {NAME_ANNOTATION: name.canonical, TAG_ANNOTATION: name.tag}} if name else {}),
    }


def image_index(manifest: Descriptor, name: ImageName | None, platform: str) -> dict[str, Any]:
    """The index of a layout that holds one image."""
    return {"schemaVersion": 2, "mediaType": INDEX, "manifests": [index_entry(manifest, name, platform)]}
