"""containerd by `ctr`, which fetches every layer before it unpacks the first."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from weightctl.benchmark.engines.base import Image, Pulled, engines
from weightctl.benchmark.engines.commands import CommandEngine, quietly, run_command
from weightctl.benchmark.results import Stage


@engines.register("containerd")
class ContainerdEngine(CommandEngine):
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
        asked = subprocess.run(["ctr", "--timeout", "20s", "version"], capture_output=True, check=False)
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
            after.callback(quietly, "umount", str(mount))
            run_command("ctr", "images", "mount", image.name, str(mount), timeout=timeout, variables=ours)
            stages = (Stage("pull", image.size, fetched - began), Stage("unpack", image.size, ended - fetched))
            yield Pulled(stages, (mount,))

    def forget(self, name: str) -> None:
        """A lease keeps what was fetched of a pull that was cut off; without one, containerd lets go of it."""
        ours = {"CONTAINERD_NAMESPACE": name.rpartition(":")[2]}
        for lease in quietly("ctr", "leases", "ls", "--quiet", variables=ours).split():
            quietly("ctr", "leases", "rm", "--sync", lease, variables=ours)
        quietly("ctr", "images", "rm", "--sync", name, variables=ours)
        quietly("ctr", "namespaces", "rm", ours["CONTAINERD_NAMESPACE"])
