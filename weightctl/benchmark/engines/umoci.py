"""skopeo and umoci: no daemon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightctl.benchmark.engines.base import Image, Pulled, engines
from weightctl.benchmark.engines.commands import CommandEngine, run_command
from weightctl.benchmark.results import Stage


@engines.register("umoci")
class UmociEngine(CommandEngine):
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
