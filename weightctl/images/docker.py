"""The local Docker engine: images streamed into it, and images in it as bases."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from weightctl.config import Config
from weightctl.digests import Check
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.images import engine_load
from weightctl.images.base import Baked, Images, Preview, describe, images, space_problems
from weightctl.images.engine import connect, diff_ids
from weightctl.images.engine_save import named_image, saved_image
from weightctl.images.oci import BaseImage, ImageName, WrittenLayer
from weightctl.images.plan import ImagePlan
from weightctl.model import Snapshot
from weightctl.progress import Progress


@images.register("docker")
class DockerImages(Images):
    """The engine that DOCKER_HOST names, or the usual one: Docker, or podman's socket that speaks its API."""

    summary = "the local Docker engine: --to docker"
    requires: ClassVar[Mapping[str, str]] = {"docker": "docker"}

    def __init__(self, location: str = "") -> None:
        if location:
            raise UsageError(
                f"--to docker:{location}: the engine has no places", "write --to docker, and set DOCKER_HOST"
            )

    @classmethod
    def unavailable(cls) -> str | None:
        """Asks the engine for its version."""
        if reason := super().unavailable():
            return reason
        try:
            with connect(timeout=20) as engine:  # on a busy machine it takes its time
                engine.api.ping()
        except WeightctlError as error:
            return error.message
        return None

    def check_compression(self, compression: str) -> None:
        """See `Images.check_compression`. Only the containerd image store keeps a layer as it was sent."""
        if compression == "none":
            return
        with connect() as engine:
            store = engine.store
        if store != "containerd":
            keeper = "podman" if store == "podman" else "this Docker engine"
            raise UsageError(
                f"--compression {compression}: {keeper} keeps layers unpacked, so that packing them only takes time",
                "leave out --compression; Docker's containerd image store (24 and newer) keeps them as they are sent",
            )

    def preview(self, plan: ImagePlan, name: ImageName, *, config: Config) -> Preview:  # noqa: ARG002
        """See `Images.preview`. Of what one load brings, the engine holds two: as sent, and unpacked.

        The containerd image store goes on to hold both.
        """
        with connect() as engine:
            held = engine.held(plan, None)
            keeps_both = engine.store == "containerd"
            directory = engine.directory
        existing = tuple(number in held for number in range(len(plan.base_layers), plan.count))
        unsent = [layer.size for layer, known in zip(plan.layers, existing, strict=True) if not known]
        largest_step = engine_load.STEP_BYTES + max(unsent, default=0)
        needed = sum(unsent) + (sum(unsent) if keeps_both else min(sum(unsent), largest_step))
        return Preview(existing, needed, space_problems(directory, needed) if directory else ())

    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """See `Images.bake`. Sends only the layers that the engine lacks. The digest is the image's ID there.

        In steps: after each, the engine has an image without a name of the layers so far, which a bake that follows a
        kill finds.
        """
        written: list[WrittenLayer] = []
        with connect() as engine:
            there = held = engine.held(plan, config)
            with progress.task("baking", plan.size) as task:
                for end in engine_load.steps(plan, held):
                    step = replace(plan, layers=plan.layers[:end])
                    engine_load.send(engine, step, None, there, written, task)
                    there = there.union(range(step.count))
                engine_load.send(engine, plan, name, there, written, task)
            image = engine.api.inspect_image(str(name))
            expected = [layer.diff_id for layer in (*plan.base_layers, *written)]
            if diff_ids(image) != expected:
                raise IntegrityError(f"the engine holds other layers under {name} than were sent", "bake again")
            engine_load.remove_unfinished(engine, expected)
        rows = [(layer, number in held) for number, layer in enumerate((*plan.base_layers, *written))]
        sent_bytes = sum(layer.blob.size for layer, old in rows if not old)
        return Baked(image["Id"], describe(plan.layers, rows[len(plan.base_layers) :]), sent_bytes)

    def build(self, dockerfile: str, platform: str | None, progress: Progress) -> str:
        """Have the engine build an image with an empty context. Returns its ID; raises WeightctlError as it fails."""
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as tar:
            entry = tarfile.TarInfo("Dockerfile")
            entry.size = len(dockerfile.encode())
            tar.addfile(entry, io.BytesIO(dockerfile.encode()))
        context.seek(0)
        with connect() as engine:
            built = engine.api.build(
                fileobj=context, custom_context=True, rm=True, forcerm=True, decode=True, platform=platform
            )
            identity = ""
            for message in built:
                if "error" in message:
                    raise WeightctlError(f"the engine cannot build the template: {message['error'].strip()}")
                if re.match(r"Step \d+/\d+ : ", message.get("stream", "")):
                    progress.note(message["stream"].strip())
                identity = (message.get("aux") or {}).get("ID", identity)
        return identity

    def check(self, against: Snapshot | None = None, *, config: Config, progress: Progress) -> Check:  # noqa: ARG002
        """An engine checks its own store."""
        raise UsageError("an image in an engine cannot be verified", "push it, then verify it in the registry")

    def open_base(self, name: str, directory: Path, *, into_itself: bool) -> BaseImage | None:
        """The engine's image of that name; None if it has none.

        Its layers, if it has any, are saved as files in `directory`, unless the image stays in the engine and that
        needs no more than their names.
        """
        import docker.errors

        with connect() as engine:
            try:
                image = engine.api.inspect_image(name)
            except docker.errors.ImageNotFound:
                return None
            if not diff_ids(image) or (into_itself and engine.store == "classic"):
                return named_image(image, name)
            return saved_image(engine, image, name, directory)
