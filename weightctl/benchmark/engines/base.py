"""What an engine has to do: pull an image and unpack it, by the clock, and then forget it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from weightctl.benchmark.results import Stage
from weightctl.errors import WeightctlError
from weightctl.registry import Backend, Registry


@dataclass(frozen=True)
class Image:
    """What is to be pulled."""

    name: str
    """As engines take it, `registry/repository:tag`."""
    size: int
    """Bytes of its layers."""
    layout: Path | None = None
    """Where it lies as an OCI layout, if it is in no registry; its tag there is that of the name."""
    plain_http: bool = False

    @property
    def tag(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(":")[2]

    @property
    def transport(self) -> str:
        """Its name for skopeo and podman."""
        return f"oci:{self.layout}:{self.tag}" if self.layout else f"docker://{self.name}"


@dataclass(frozen=True)
class Pulled:
    """An image that is unpacked on this machine."""

    stages: tuple[Stage, ...]
    roots: tuple[Path, ...]
    """Directories whose files together are the image's."""

    def find(self, path: str) -> Path:
        """A file of the image here. Raises WeightctlError if there is none that can be read."""
        for root in self.roots:
            with contextlib.suppress(OSError):
                if (found := root / path.lstrip("/")).is_file():
                    return found
        raise WeightctlError(
            f"the engine's own files cannot be read here: {path}", "run this as root on the engine's machine"
        )


class Engine(Backend, ABC):
    """What pulls an image and unpacks it."""

    reads_layouts: ClassVar[bool] = False
    takes_jobs: ClassVar[bool] = False
    """Whether it can be told how many layers to fetch at once."""

    @abstractmethod
    @contextmanager
    def pulled(self, image: Image, jobs: int | None, scratch: Path, timeout: float) -> Iterator[Pulled]:
        """Pull and unpack by the clock; the image is gone when the block ends. `timeout` is in seconds, of each step.

        Everything outside of `scratch` is what `forget` removes. Raises WeightctlError if the engine cannot.
        """

    def forget(self, name: str) -> None:
        """Remove what the engine has of an image that was pulled here, if anything."""


engines: Registry[Engine] = Registry("engine")
