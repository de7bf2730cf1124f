"""The engines that pull images on this machine, and what there is to see of a pull while it goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from weightctl.benchmark.results import Stage
from weightctl.benchmark.scratch import PREFIX, sweep, temporary
from weightctl.errors import WeightctlError
from weightctl.registry import Backend, Registry

ENDING_SECONDS = 10
"""What a command has to clean up after itself when it is not to go on."""

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


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

PODMAN_RUN = Path("/tmp")
"""podman takes a --runroot of 50 characters at most."""


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
            with contextlib.closing(docker.from_env(timeout=2)) as client:
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


class _Commands(Engine):
    """An engine that is told by commands."""

    commands: ClassVar[tuple[str, ...]]
    package: ClassVar[str]
    """Of Debian, which has them."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Looks for the commands; they mount or change owners, so only root can use them."""
        for command in cls.commands:
            if shutil.which(command) is None:
                return f"{command} is not installed: apt-get install {cls.package}"
        return None if os.geteuid() == 0 else f"{cls.commands[-1]} needs root to unpack an image"


@engines.register("containerd")
class ContainerdEngine(_Commands):
    """containerd by its own client, at CONTAINERD_ADDRESS or the usual place."""

    summary = "containerd, by ctr"
    commands = ("ctr",)
    package = "containerd"
    takes_jobs = True

    @classmethod
    def unavailable(cls) -> str | None:
        """Asks it."""
        if reason := super().unavailable():
            return reason
        asked = subprocess.run(["ctr", "--timeout", "2s", "version"], capture_output=True, check=False)
        return "containerd does not answer: start it, or set CONTAINERD_ADDRESS" if asked.returncode else None

    @contextmanager
    def pulled(self, image: Image, jobs: int | None, scratch: Path, timeout: float) -> Iterator[Pulled]:
        """`ctr` says when it begins to unpack. Everything is in a namespace of the image's own."""
        mount, ours = scratch / "mounted", {"CONTAINERD_NAMESPACE": image.tag}
        options = ["--plain-http"] if image.plain_http else []
        options += ["--max-concurrent-downloads", str(jobs)] if jobs else []
        marks: list[float] = []

        def see(line: str) -> None:
            if line.startswith("unpacking "):
                marks.append(time.perf_counter())

        with ExitStack() as after:
            after.callback(self.forget, image.name)
            began = time.perf_counter()
            run_command("ctr", "images", "pull", *options, image.name, timeout=timeout, see=see, variables=ours)
            ended = time.perf_counter()
            fetched = marks[0] if marks else ended
            mount.mkdir()
            after.callback(_quietly, "umount", str(mount))
            run_command("ctr", "images", "mount", image.name, str(mount), timeout=timeout, variables=ours)
            stages = (Stage("pull", image.size, fetched - began), Stage("unpack", image.size, ended - fetched))
            yield Pulled(stages, (mount,))

    def forget(self, name: str) -> None:
        """A lease keeps what was fetched of a pull that was cut off; without one, containerd lets go of it."""
        ours = {"CONTAINERD_NAMESPACE": name.rpartition(":")[2]}
        for lease in _quietly("ctr", "leases", "ls", "--quiet", variables=ours).split():
            _quietly("ctr", "leases", "rm", "--sync", lease, variables=ours)
        _quietly("ctr", "images", "rm", "--sync", name, variables=ours)
        _quietly("ctr", "namespaces", "rm", ours["CONTAINERD_NAMESPACE"])


@engines.register("podman")
class PodmanEngine(_Commands):
    """podman with a store of its own, which unpacks while it pulls and does not say when."""

    summary = "podman"
    commands = ("podman",)
    package = "podman"
    reads_layouts = True
    takes_jobs = True

    @contextmanager
    def pulled(self, image: Image, jobs: int | None, scratch: Path, timeout: float) -> Iterator[Pulled]:
        """One stage."""
        settings = scratch / "containers.conf"
        settings.write_text(f"[engine]\nimage_parallel_copies = {jobs}\n" if jobs else "")
        with temporary(PODMAN_RUN) as run, ExitStack() as after:
            podman = [
                "podman", "--root", str(scratch / "root"), "--runroot", str(run),
                "--cgroup-manager", "cgroupfs", "--events-backend", "none",
            ]  # fmt: skip
            plain = ["--tls-verify=false"] if image.plain_http else []
            after.callback(_quietly, *podman, "image", "rm", "--all", "--force")
            began = time.perf_counter()
            pull = [*podman, "pull", "--quiet", *plain, image.transport]
            ours = {"CONTAINERS_CONF": str(settings), "TMPDIR": str(scratch)}
            found = run_command(*pull, timeout=timeout, variables=ours).strip()
            stage = Stage("pull", image.size, time.perf_counter() - began)
            after.callback(_quietly, *podman, "image", "unmount", "--all")
            mounted = run_command(*podman, "image", "mount", found, timeout=timeout).strip()
            yield Pulled((stage,), (Path(mounted),))

    def forget(self, name: str) -> None:  # noqa: ARG002
        """The store goes with the scratch directory; this is what podman keeps of it elsewhere."""
        sweep(PODMAN_RUN, f"{PREFIX}*")


@engines.register("umoci")
class UmociEngine(_Commands):
    """skopeo, which copies an image here as it is, then umoci, which unpacks it: no daemon."""

    summary = "skopeo and umoci"
    commands = ("skopeo", "umoci")
    package = "skopeo umoci"
    reads_layouts = True

    @contextmanager
    def pulled(self, image: Image, jobs: int | None, scratch: Path, timeout: float) -> Iterator[Pulled]:  # noqa: ARG002
        """Two commands, two stages."""
        here, bundle = f"{scratch / 'layout'}:image", scratch / "bundle"
        options = ["--src-tls-verify=false"] if image.plain_http else []
        began = time.perf_counter()
        ours = {"TMPDIR": str(scratch)}
        run_command("skopeo", "copy", *options, image.transport, f"oci:{here}", timeout=timeout, variables=ours)
        fetched = time.perf_counter()
        run_command("umoci", "unpack", "--image", here, str(bundle), timeout=timeout)
        ended = time.perf_counter()
        stages = (Stage("pull", image.size, fetched - began), Stage("unpack", image.size, ended - fetched))
        yield Pulled(stages, (bundle / "rootfs",))


def run_command(
    *command: str, timeout: float, see: Callable[[str], object] = id, variables: Mapping[str, str] | None = None
) -> str:
    """What a command prints; `see` is given every line at once.

    Raises WeightctlError if it fails, or takes longer than `timeout` seconds. However this ends, nothing of it is left:
    Ctrl-C is kept from it, and it is ended with time to clean up; if this process is killed, so is it.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **(variables or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, text=True, errors="replace", start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        late = threading.Timer(timeout, process.terminate)
        late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                see(line)
                lines.append(line)
            process.wait()
        finally:
            expired = late.finished.is_set()
            late.cancel()
            _end(process)
        if expired:
            raise WeightctlError(f"{command[0]} was stopped: it had not ended after {timeout:g} seconds")
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[2] or f"it ended with {process.returncode}"
            raise WeightctlError(f"{command[0]} failed: {last[-300:]}")
    return "".join(lines)


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _quietly(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """Clean up, as far as there is something to."""
    try:
        return run_command(*command, timeout=60, variables=variables)
    except WeightctlError:
        return ""
