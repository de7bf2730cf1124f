"""An engine that speaks Docker's API: how it keeps images, and what it has of one that is to be."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightctl import storage
from weightctl.config import Config
from weightctl.errors import WeightctlError, translated_os_errors
from weightctl.images.layers import known_layer, remembered_layer
from weightctl.images.oci import WrittenLayer
from weightctl.images.plan import MODEL_DIRECTORY_VARIABLE, ImagePlan
from weightctl.images.transport import reason
from weightctl.images.uploads import Memory
from weightctl.progress import Task

if TYPE_CHECKING:
    import docker

PIPE_BYTES = 1 << 20
"""What an unprivileged process may make of a pipe; that much goes to and comes from an engine at a time."""


@contextlib.contextmanager
def connect(timeout: int = 24 * 3600) -> Iterator[Engine]:
    """The engine that DOCKER_HOST names, or the usual one. `timeout` is in seconds of silence.

    Raises WeightctlError if none answers, and for whatever goes wrong with it in the block.
    """
    import docker

    with engine_errors():
        client = docker.from_env(timeout=timeout)
        try:
            yield Engine(client.api)
        finally:
            client.close()


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turn what the docker package raises in the block into a `WeightctlError`."""
    import docker.errors
    import requests

    where = os.environ.get("DOCKER_HOST", "its usual socket")
    try:
        yield
    except docker.errors.APIError as error:
        raise refusal(str(error.explanation or error)) from error
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # a file of the model, not the engine's socket
            with translated_os_errors("read the model"):
                raise
        raise WeightctlError(
            f"no Docker engine answers at {where}: {reason(error, str(error).partition(chr(10))[0])}",
            "start it, set DOCKER_HOST, or bake with --to layout:DIR",
        ) from error


def refusal(words: str) -> WeightctlError:
    """What an engine says of why it does not do as it is told, as an error of ours."""
    full = "no space left" in words
    hint = "free some of the engine's disk: docker system prune" if full else "see the engine's log"
    return WeightctlError(f"the Docker engine refuses: {words}", hint)


class Engine:
    """An engine that answers."""

    def __init__(self, api: docker.APIClient) -> None:
        self.api = api

    @functools.cached_property
    def store(self) -> Literal["classic", "containerd", "podman"]:
        """How it keeps images: in Docker's own store, in containerd's image store, or as podman does."""
        if not any(component.get("Name") == "Engine" for component in self.api.version().get("Components") or []):
            return "podman"
        containerd = any("containerd" in str(value) for _, value in self.api.info().get("DriverStatus") or [])
        return "containerd" if containerd else "classic"

    @property
    def directory(self) -> Path | None:
        """Where it keeps images; None if that is on another machine."""
        if self.api.base_url != "http+docker://localhost":  # what a socket's is
            return None
        directory = Path(self.api.info().get("DockerRootDir") or "/")
        return directory if directory.is_dir() else None

    def images(self, filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The images there that the filters name, and when each was made, in seconds since 1970.

        One that is removed meanwhile is left out.
        """
        import docker.errors

        for image in self.api.images(filters=filters):
            with contextlib.suppress(docker.errors.ImageNotFound):
                yield {**self.api.inspect_image(image["Id"]), "CreatedSeconds": image["Created"]}

    def held(self, plan: ImagePlan, config: Config | None) -> frozenset[int]:
        """Which layers of the image to be, counted from the lowest, it has and need not be sent.

        The classic store keys layers on what lies below them: it has those up to the first that differs from an image
        there. Podman finds a layer of any image. The containerd image store has any blob that an image there is made
        of; which those are it does not say, so only what we sent counts. Without a config no file is read: layers
        count whose digests are remembered.
        """
        there = list(self.images({}))
        baked_before = any(
            str(setting).startswith(MODEL_DIRECTORY_VARIABLE)
            for image in there
            for setting in (image.get("Config") or {}).get("Env") or []
        )
        wanted: list[WrittenLayer | None] = [*plan.base_layers]
        if config is None:
            wanted += map(remembered_layer, plan.layers)
        elif baked_before:  # only then is it worth reading layers whose digests are not remembered
            wanted += storage.in_parallel(lambda layer: known_layer(layer, Task()), plan.layers, config.workers)
        if self.store == "containerd":
            memory, identities = self._memory, {image["Id"].removeprefix("sha256:") for image in there}
            blobs = enumerate(layer and layer.blob.digest for layer in wanted)
            return frozenset(number for number, digest in blobs if digest and memory.repository(digest) in identities)
        if self.store == "podman":
            found = {diff_id for image in there for diff_id in diff_ids(image)}
            return frozenset(number for number, layer in enumerate(wanted) if layer and layer.diff_id in found)
        chain = [layer.diff_id for layer in itertools.takewhile(bool, wanted) if layer]
        return frozenset(range(max((_common(chain, diff_ids(image)) for image in there), default=0)))

    def remember(self, layers: Sequence[WrittenLayer], image: str) -> None:
        """These were sent, in the image of that ID: while the containerd image store has it, it has their blobs."""
        if self.store == "containerd":
            for layer in layers:
                self._memory.remember(layer.blob.digest, image.removeprefix("sha256:"))

    @functools.cached_property
    def _memory(self) -> Memory:
        return Memory(f"engine-{hashlib.sha256(str(self.api.info().get('ID')).encode()).hexdigest()}")


def diff_ids(image: dict[str, Any]) -> list[str]:
    """The diffIDs of an image's layers, the lowest first."""
    return list(image["RootFS"].get("Layers") or [])


def _common(wanted: Sequence[str], there: Sequence[str]) -> int:
    pairs = zip(wanted, there, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
