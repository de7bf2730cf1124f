"""Other people's tools that judge what weightctl wrote: skopeo, umoci, podman."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tests.disk import cannot
from tests.models import wait_for


def tool(name: str, *arguments: object, as_root: bool = False) -> str:
    """What the tool prints. Without it the test is skipped, or fails where all services are promised."""
    if shutil.which(name) is None:
        cannot(f"{name} is not installed")
    if as_root and os.geteuid() != 0:
        cannot(f"{name} needs root for this")
    done = subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{name} {arguments}: {done.stderr}"
    return done.stdout


def inspect(image: str) -> dict[str, Any]:
    """`skopeo inspect`: names, digest, layers and environment of an image."""
    return json.loads(tool("skopeo", "inspect", image))  # type: ignore[no-any-return]


def unpack(layout: Path, tag: str, destination: Path) -> Path:
    """The image's root filesystem, unpacked by umoci."""
    tool("umoci", "unpack", "--image", f"{layout}:{tag}", destination, as_root=True)
    return destination / "rootfs"


@contextmanager
def podman_mount(image: str, *options: str) -> Iterator[Path]:
    """The root filesystem of an image that podman pulls into a store of its own."""
    with tempfile.TemporaryDirectory() as scratch:  # podman refuses the long paths that pytest makes
        store = [
            "--root", f"{scratch}/root", "--runroot", f"{scratch}/run", "--storage-driver", "vfs",
            "--cgroup-manager", "cgroupfs", "--events-backend", "none",
        ]  # fmt: skip
        digest = tool("podman", *store, "pull", "--quiet", *options, image, as_root=True).strip()
        try:
            yield Path(tool("podman", *store, "image", "mount", digest, as_root=True).strip())
        finally:
            tool("podman", *store, "image", "unmount", digest, as_root=True)
            tool("podman", *store, "image", "rm", "--force", digest, as_root=True)


@contextmanager
def docker_registry(directory: Path, auth: str = "") -> Iterator[str]:
    """A registry of the Docker project, with plain HTTP, for the time of the block: its host and port.

    `auth` is what its configuration says under that name, in YAML on one line.
    """
    if shutil.which("docker-registry") is None:
        cannot("docker-registry is not installed")
    with (directory / "registry.log").open("w") as log:
        host, process = _start_registry(directory, auth, log)
        while process.poll() is not None:
            said = Path(log.name).read_text()
            assert "address already in use" in said, said  # somebody has just taken that port
            host, process = _start_registry(directory, auth, log)
        try:
            yield host
        finally:
            process.terminate()
            process.wait()


def _start_registry(directory: Path, auth: str, log: IO[str]) -> tuple[str, subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    settings = directory / "registry.yml"
    settings.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'storage'}}}}}\n"
        f"http: {{addr: '{host}', secret: the same after a restart}}\n" + (f"auth: {auth}\n" if auth else "")
    )
    process = subprocess.Popen(["docker-registry", "serve", settings], stdout=log, stderr=log)
    wait_for(lambda: process.poll() is not None or _answers(host))
    return host, process


def _answers(host: str) -> bool:
    address, _, port = host.partition(":")
    with contextlib.suppress(OSError), socket.create_connection((address, int(port))):
        return True
    return False


@contextmanager
def docker_engine() -> Iterator[str]:
    """A Docker engine of its own for the time of the block: what DOCKER_HOST has to be."""
    if shutil.which("dockerd") is None:
        cannot("dockerd is not installed")
    if os.geteuid() != 0:
        cannot("dockerd needs root")
    with tempfile.TemporaryDirectory(prefix="dockerd-") as directory:  # a socket's path has to be short
        socket_path = Path(directory, "socket")
        command = [
            "dockerd", "--host", f"unix://{socket_path}", "--data-root", f"{directory}/data",
            "--exec-root", f"{directory}/exec", "--pidfile", f"{directory}/pid", "--bridge", "none", "--iptables=false",
        ]  # fmt: skip
        with Path(directory, "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                _wait_for_socket(socket_path, process, Path(directory, "log"))
                yield f"unix://{socket_path}"
            finally:
                process.terminate()
                process.wait()
                subprocess.run(
                    ["umount", "--recursive", f"{directory}/data/overlay2"], check=False, capture_output=True
                )


@contextmanager
def podman_engine() -> Iterator[str]:
    """Podman behind its Docker-compatible socket, with a store of its own: what DOCKER_HOST has to be."""
    if shutil.which("podman") is None:
        cannot("podman is not installed")
    if os.geteuid() != 0:
        cannot("podman's service needs root here")
    with tempfile.TemporaryDirectory(prefix="podman-") as directory:
        command = [
            "podman", "--root", f"{directory}/root", "--runroot", f"{directory}/run", "--storage-driver", "vfs",
            "--cgroup-manager", "cgroupfs", "--events-backend", "none", "system", "service", "--time=0",
            f"unix://{directory}/socket",
        ]  # fmt: skip
        with Path(directory, "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": directory})
            try:
                _wait_for_socket(Path(directory, "socket"), process, Path(directory, "log"))
                yield f"unix://{directory}/socket"
            finally:
                process.terminate()
                process.wait()


def _wait_for_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        if process.poll() is not None:
            cannot(f"the engine does not start here: {log.read_text()[-500:]}")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as trial:
            trial.connect(str(path))
            return True
        return False

    wait_for(answers)
