"""The image that a bake puts the model's layers on: found by `--base`, or built from `--template`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.images import DockerImages, LayoutImages, RemoteImages
from weightctl.images.bases import platform_of, same_platform
from weightctl.images.oci import BaseImage


def open_base(spec: str, platform: str | None, target: str, scratch: ExitStack, *, config: Config) -> BaseImage | None:
    """The image that `spec` names: `scratch`, `layout:DIR[#TAG]`, `docker:NAME`, `registry:NAME` or a plain NAME.

    A plain name is the engine's image if the engine is also the `target` and has it, and the registry's otherwise.
    What has to be saved on the way is removed when `scratch` is closed. Raises UsageError if there is none for
    `platform`.
    """
    kind, _, rest = spec.partition(":")
    if spec == "scratch":
        return None
    base: BaseImage | None = None
    if kind == "layout":
        location, _, tag = rest.partition("#")
        base = LayoutImages(location).open_base(tag or None, platform)
    elif kind == "docker" or (target == "docker" and kind != "registry"):
        directory = scratch.enter_context(tempfile.TemporaryDirectory(prefix="weightctl-"))
        name = rest if kind == "docker" else spec
        base = DockerImages().open_base(name, Path(directory), into_itself=target == "docker")
    if base is None and kind == "docker":
        raise UsageError(f"the engine has no image {rest!r}", "docker pull it, or name a registry's image with --base")
    if base is None:
        base = RemoteImages(rest if kind == "registry" else spec).open_base(platform, config=config)
    if platform and not same_platform(platform, platform_of(base)):
        raise UsageError(f"the base {spec} is for {platform_of(base)}, not for {platform}")
    return base
