"""Bake a model into a container image."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError
from weightctl.images import BakedLayer, DockerImages, Images, images
from weightctl.images.bases import platform_of
from weightctl.images.compression import check_compression
from weightctl.images.oci import ImageName
from weightctl.images.plan import ImagePlan, check_created, check_directory, check_platform, plan_image
from weightctl.model import Snapshot
from weightctl.operations import resolve
from weightctl.operations.base import open_base
from weightctl.progress import Progress
from weightctl.template import facts, render

CREDENTIALS = (
    ".env", ".env.*", ".git-credentials", ".netrc", ".npmrc", ".pypirc", "*.key", "*.pem", "credentials", "id_dsa",
    "id_ecdsa", "id_ed25519", "id_rsa", "token",
)  # fmt: skip
"""Names (in lower case) under which secrets are kept."""

DEFAULT_PLATFORM = "linux/amd64"
"""Of an image on scratch: fixed, so that a digest does not depend on the machine."""


@dataclass(frozen=True)
class BakeResult:
    """An image that is where it belongs."""

    tag: str
    target: str
    digest: str
    layers: tuple[BakedLayer, ...]
    bytes: int
    """Of all layers."""
    written_bytes: int
    seconds: float


@dataclass(frozen=True)
class PlannedLayer:
    """A layer to be."""

    size: int
    files: tuple[str, ...]
    exists: bool
    """Whether the target is known to have it."""


@dataclass(frozen=True)
class BakePlan:
    """What a bake would write."""

    tag: str
    target: str
    layers: tuple[PlannedLayer, ...]
    bytes: int
    missing_bytes: int
    """Of the model, what would first have to be fetched."""
    write_bytes: int
    """Of layers that the target is not known to have."""
    peak_disk_bytes: int
    """What the target's disk has to have free."""
    problems: tuple[str, ...]
    """Why it would fail, as far as can be told."""


@dataclass(frozen=True)
class Recipe:
    """What the image is to be, besides the model's files."""

    tag: str
    to: str | None = None
    """`BACKEND[:LOCATION]`; the Docker engine if one answers, and otherwise a layout, unless given."""
    base: str = "scratch"
    """See `open_base`."""
    template: Path | None = None
    """A Dockerfile template, whose image is the base."""
    path: str | None = None
    """Where the image keeps the model; `/models/NAME` unless given."""
    platform: str | None = None
    """`os/architecture`; the base's unless given."""
    compression: str = "none"
    """`none`, `zstd` or `gzip`."""
    created: str | None = None
    """An RFC 3339 time for the image's annotations; left out unless given, so that digests do not depend on it."""


def bake(
    model: str,
    recipe: Recipe,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> BakeResult:
    """Write `model` as an image: a layer for each weight file, one for the small files.

    The same model and recipe give the same digest on every machine. Raises IntegrityError if a file's bytes are not
    what its source says of them.
    """
    began = time.monotonic()
    name, to, target = _checked(recipe, progress)
    snapshot = resolve.resolve(
        model, revision=revision, include=include, exclude=exclude, verify=False, config=config, progress=progress
    )
    with ExitStack() as scratch:
        image = _plan(snapshot, recipe, to, include, scratch, config, progress)
        preview = target.preview(image, name, config=config)
        if preview.problems:
            raise WeightctlError("; ".join(preview.problems), "nothing was written")
        baked = target.bake(image, name, config=config, progress=progress)
    return BakeResult(
        tag=str(name),
        target=to,
        digest=baked.digest,
        layers=baked.layers,
        bytes=image.size,
        written_bytes=baked.written_bytes,
        seconds=time.monotonic() - began,
    )


def plan_bake(
    model: str,
    recipe: Recipe,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> BakePlan:
    """What `bake` would write. Touches nothing."""
    name, to, target = _checked(recipe, progress)
    found = resolve.plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    with ExitStack() as scratch:
        image = _plan(found.snapshot, recipe, to, include, scratch, config, progress, build=False)
        preview = target.preview(image, name, config=config)
    layers = [
        PlannedLayer(layer.size, tuple(file.path for file in layer.files), exists)
        for layer, exists in zip(image.layers, preview.existing, strict=True)
    ]
    return BakePlan(
        tag=str(name),
        target=to,
        layers=tuple(layers),
        bytes=image.size,
        missing_bytes=sum(file.size for file in found.missing),
        write_bytes=sum(layer.size for layer in layers if not layer.exists),
        peak_disk_bytes=preview.peak_disk_bytes,
        problems=preview.problems,
    )


def _checked(recipe: Recipe, progress: Progress) -> tuple[ImageName, str, Images]:
    """The image's name, where it goes, and the backend for that. What is wrong with the recipe is found here."""
    if recipe.template is not None and recipe.base != "scratch":
        raise UsageError("--template builds the base itself", "leave out --base, and name the base in the FROM line")
    if recipe.platform is not None:
        check_platform(recipe.platform)
    if recipe.path is not None:
        check_directory(recipe.path)
    if recipe.created is not None:
        check_created(recipe.created)
    check_compression(recipe.compression)
    name = ImageName.parse(recipe.tag)
    to = recipe.to or _default_target(name, progress)
    backend, _, location = to.partition(":")
    target = images.get(backend)(location)
    target.check_compression(recipe.compression)
    return name, to, target


def _default_target(name: ImageName, progress: Progress) -> str:
    reason = images.get("docker").unavailable()
    to = f"layout:./{name.repository.split('/')[-1]}.oci" if reason else "docker"
    progress.note(f"baking to {to}{f', since {reason}' if reason else ''}")
    return to


def _plan(
    snapshot: Snapshot,
    recipe: Recipe,
    to: str,
    include: Sequence[str],
    scratch: ExitStack,
    config: Config,
    progress: Progress,
    *,
    build: bool = True,
) -> ImagePlan:
    _refuse_credentials(snapshot, include)
    path = check_directory(recipe.path or f"/models/{snapshot.name}")
    base = recipe.base
    if recipe.template is not None:
        dockerfile = render(recipe.template, facts(snapshot, path))
        base = f"docker:{DockerImages().build(dockerfile, recipe.platform, progress)}" if build else "scratch"
    image = open_base(base, recipe.platform, to.partition(":")[0], scratch, config=config)
    platform = platform_of(image) if image else recipe.platform or DEFAULT_PLATFORM
    return plan_image(snapshot, path, platform, recipe.created, image, recipe.compression)


def _refuse_credentials(snapshot: Snapshot, include: Sequence[str]) -> None:
    """An image is copied to many places: what looks like a credential is only baked in by its own name."""
    for file in snapshot.files:
        name = PurePosixPath(file.path).name.lower()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in CREDENTIALS) and file.path not in include:
            raise UsageError(
                f"{file.path} looks like a credential, and would be in the image for everybody to read",
                f"leave it out with --exclude '{file.path}', or name it with --include",
            )
