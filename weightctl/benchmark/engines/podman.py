"""podman, with a store of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from weightctl.benchmark.engines.base import Image, Pulled, engines
from weightctl.benchmark.engines.commands import CommandEngine, quietly, run_command
from weightctl.benchmark.results import Stage
from weightctl.benchmark.scratch import PREFIX, sweep, temporary

PODMAN_RUN = Path("/tmp")
"""podman takes a --runroot of 50 characters at most."""


@engines.register("podman")
class PodmanEngine(CommandEngine):
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
            after.callback(quietly, *podman, "image", "rm", "--all", "--force")
            began = time.perf_counter()
            pull = [*podman, "pull", "--quiet", *plain, image.transport]
            ours = {"CONTAINERS_CONF": str(settings), "TMPDIR": str(scratch)}
            found = run_command(*pull, timeout=timeout, variables=ours).strip()
            stage = Stage("pull", image.size, time.perf_counter() - began)
            after.callback(quietly, *podman, "image", "unmount", "--all")
            mounted = run_command(*podman, "image", "mount", found, timeout=timeout).strip()
            yield Pulled((stage,), (Path(mounted),))

    def forget(self, name: str) -> None:  # noqa: ARG002
        """The store goes with the scratch directory; this is what podman keeps of it elsewhere."""
        sweep(PODMAN_RUN, f"{PREFIX}*")
