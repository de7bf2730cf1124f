"""The engines that pull images on this machine: one file for each."""

from weightctl.benchmark.engines import containerd, docker, podman, umoci
from weightctl.benchmark.engines.base import Engine, Image, Pulled, engines

__all__ = ["Engine", "Image", "Pulled", "containerd", "docker", "engines", "podman", "umoci"]
