"""Bake a model into a container image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.images import BakedLayer, Images, images
from weightctl.images.oci import ImageName, ImagePlan, check_directory, check_platform, plan_image
from weightctl.model import Snapshot
from weightctl.operations import resolve
from weightctl.progress import Progress


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


@dataclass(frozen=True)
class BakePlan:
    """What a bake would write."""

    tag: str
    target: str
    layers: tuple[PlannedLayer, ...]
    bytes: int
    missing_bytes: int
    """Of the model, what would first have to be fetched."""


@dataclass(frozen=True)
class Recipe:
    """What the image is to be, besides the model's files."""

    tag: str
    to: str
    """`BACKEND:LOCATION`."""
    base: str = "scratch"
    path: str | None = None
    """Where the image keeps the model; `/models/NAME` unless given."""
    platform: str = "linux/amd64"
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
    name, target = _checked(recipe)
    snapshot = resolve.resolve(
        model, revision=revision, include=include, exclude=exclude, verify=False, config=config, progress=progress
    )
    image = _plan(snapshot, recipe)
    baked = target.bake(image, name, config=config, progress=progress)
    return BakeResult(
        tag=str(name),
        target=recipe.to,
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
    name, _ = _checked(recipe)
    found = resolve.plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    image = _plan(found.snapshot, recipe)
    return BakePlan(
        tag=str(name),
        target=recipe.to,
        layers=tuple(PlannedLayer(layer.size, tuple(file.path for file in layer.files)) for layer in image.layers),
        bytes=image.size,
        missing_bytes=sum(file.size for file in found.missing),
    )


def _checked(recipe: Recipe) -> tuple[ImageName, Images]:
    """Everything that can be wrong with the recipe is found before anything moves."""
    if recipe.base != "scratch":
        raise UsageError(f"cannot bake on {recipe.base!r} yet", "--base scratch is the only base so far")
    check_platform(recipe.platform)
    if recipe.path is not None:
        check_directory(recipe.path)
    backend, _, location = recipe.to.partition(":")
    return ImageName.parse(recipe.tag), images.get(backend)(location)


def _plan(snapshot: Snapshot, recipe: Recipe) -> ImagePlan:
    directory = recipe.path or f"/models/{snapshot.name}"
    return plan_image(snapshot, check_directory(directory), recipe.platform, recipe.created)
