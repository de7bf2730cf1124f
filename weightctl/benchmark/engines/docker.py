"""The Docker engine: it fetches and unpacks at once, and tells its events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from weightctl.benchmark.engines.base import Engine, Image, Pulled, engines
from weightctl.benchmark.results import Stage
from weightctl.errors import WeightctlError


@engines.register("docker")
class DockerEngine(Engine):
    """The engine that DOCKER_HOST names, or the usual one."""

    summary = "the Docker engine"
    requires: ClassVar[Mapping[str, str]] = {"docker": "docker"}

    @classmethod
    def unavailable(cls) -> str | None:
        """Asks it."""
        if reason := super().unavailable():
            return reason
        import docker

        try:
            with contextlib.closing(docker.from_env(timeout=20)) as client:
                client.ping()
        except (docker.errors.DockerException, OSError):
            return "no Docker engine answers: start it, or set DOCKER_HOST"
        return None

    @contextmanager
    def pulled(self, image: Image, jobs: int | None, scratch: Path, timeout: float) -> Iterator[Pulled]:  # noqa: ARG002
        """Fetching ends with the last layer's download; what unpacking is left then is told apart."""
        import docker
        import docker.errors

        repository, _, tag = image.name.rpartition(":")
        with ExitStack() as after, contextlib.closing(docker.from_env(timeout=timeout)) as client:
            after.callback(self.forget, image.name)
            try:
                began = fetched = time.perf_counter()
                for event in client.api.pull(repository, tag, stream=True, decode=True):
                    if "error" in event:
                        raise WeightctlError(f"the Docker engine cannot pull: {event['error']}", "see the engine's log")
                    if event.get("status") == "Download complete":
                        fetched = time.perf_counter()
                ended = time.perf_counter()
                stages = (Stage("pull", image.size, fetched - began), Stage("unpack", image.size, ended - fetched))
                yield Pulled(stages, _layers(client.api.inspect_image(image.name)))
            except (docker.errors.DockerException, OSError) as error:
                raise WeightctlError(f"the Docker engine cannot pull: {error}", "see the engine's log") from error

    def forget(self, name: str) -> None:
        """Its layers go with it: no other image has them."""
        import docker
        import docker.errors

        with (
            contextlib.suppress(docker.errors.DockerException, OSError),
            contextlib.closing(docker.from_env()) as client,
        ):
            client.api.remove_image(name, force=True)


def _layers(image: dict[str, object]) -> tuple[Path, ...]:
    """The directories of an image's layers, where the engine keeps them as such, the uppermost first."""
    driver = image.get("GraphDriver")
    data = driver.get("Data") if isinstance(driver, dict) else None
    if not isinstance(data, dict) or "UpperDir" not in data:
        raise WeightctlError(
            "the Docker engine keeps images where only containers see them", "pull with another: --engine containerd"
        )
    return (Path(data["UpperDir"]), *(Path(path) for path in str(data.get("LowerDir", "")).split(":") if path))
