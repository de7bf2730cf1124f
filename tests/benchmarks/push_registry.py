"""Bake into a registry, against docker build + docker push and skopeo copy of a ready layout; and what a kill costs.

    python -m tests.benchmarks.push_registry [--directory DIR] [--gib 4]

Every row pushes the same model into an empty docker-registry of its own on this machine, as a user would: the start
of the command included. DOCKER_HOST says which engine builds and pushes; without an engine its row is left out.
The bytes in the table are those that the registry's end of the connection saw.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.bake_and_push import SETTLE_SECONDS, make_model
from tests.chaos_proxy import ChaosProxy
from tests.services import docker_registry

GIB = 1 << 30
BAKE = (sys.executable, "-m", "weightctl", "bake")


def run(*command: object) -> float:
    """Seconds that a command takes."""
    began = time.monotonic()
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def bake(model: Path, host: str) -> float:
    """To a registry."""
    return run(*BAKE, model, "--to", "registry", "--tag", f"{host}/model:v1")


def docker_build_and_push(model: Path, host: str) -> float:
    """An image with one COPY for each shard, so that a changed shard is one changed layer here too."""
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    copies = [f"COPY {name} /models/model/" for name in ("config.json", *shards)]
    dockerfile = model.parent / "Dockerfile"
    dockerfile.write_text("\n".join(["FROM scratch", *copies, ""]))
    try:
        build = run("docker", "build", "--file", dockerfile, "--tag", f"{host}/model:v1", model)
        push = run("docker", "push", f"{host}/model:v1")
        print(f"  (docker build {build:.2f} s, docker push {push:.2f} s)")
        return build + push
    finally:
        subprocess.run(["docker", "image", "rm", f"{host}/model:v1"], capture_output=True, check=False)


def skopeo_copy(layout: Path, host: str) -> float:
    """Of a layout that weightctl baked before, which is not in the time; as it is, not compressed."""
    source, destination = f"oci:{layout}:v1", f"docker://{host}/model:v1"
    return run("skopeo", "copy", "--preserve-digests", "--dest-tls-verify=false", source, destination)


def into_a_registry(push: Callable[[Path, str], float], source: Path, scratch: Path) -> float:
    """Push into an empty registry."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory, docker_registry(Path(directory)) as host:
        return push(source, host)


def forget() -> None:
    """Nothing is remembered of what was hashed or pushed before."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def one_shard_changed(model: Path, scratch: Path) -> tuple[float, int]:
    """Seconds and bytes of a second bake, after the last of the shards has changed."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory, docker_registry(Path(directory)) as host:
        bake(model, host)
        shard = max(model.glob("*.safetensors"))
        with shard.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(os.urandom(1))
        with ChaosProxy(host) as proxy:
            return bake(model, proxy.host), sum(proxy.body_bytes.values())


def interrupted(model: Path, scratch: Path, how: signal.Signals, *, buffered: bool) -> tuple[int, int, int]:
    """The blob's bytes, those that had been sent when the signal came in its middle, and those sent by the rerun."""
    with (
        tempfile.TemporaryDirectory(dir=scratch) as directory,
        docker_registry(Path(directory)) as host,
        ChaosProxy(host, buffered=buffered) as proxy,
    ):
        proxy.hold_after = GIB // 2 + (8 << 20)
        command = [*map(str, (*BAKE, model, "--to", "registry", "--tag", f"{proxy.host}/model:v1"))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        proxy.held.wait()
        process.send_signal(how)
        if how == signal.SIGKILL:
            process.wait()
        proxy.go_on.set()
        process.wait()
        while proxy.active:
            time.sleep(0.01)
        before = proxy.body_bytes["PATCH"]
        done = subprocess.run([*command, "--json"], capture_output=True, check=True)
        return json.loads(done.stdout)["layers"][0]["size"], before, proxy.body_bytes["PATCH"] - before


def show(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table in Markdown."""
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    print()


def main() -> None:
    """Make the model, push it every way, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="scratch space (default: a temporary directory)")
    parser.add_argument("--gib", type=float, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        scratch = Path(directory)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        model, one = scratch / "model", scratch / "one"
        size = int(arguments.gib * GIB)
        make_model(model, size)
        one.mkdir()
        with (one / "model.safetensors").open("wb") as stream:
            for _ in range(256):
                stream.write(os.urandom(GIB // 256))
        time.sleep(SETTLE_SECONDS)

        seconds = {"weightctl bake --to registry": into_a_registry(bake, model, scratch)}
        seconds["the same, digests remembered"] = into_a_registry(bake, model, scratch)
        layout = scratch / "layout"
        run(*BAKE, model, "--to", f"layout:{layout}", "--tag", "model:v1")
        if shutil.which("skopeo"):
            seconds["skopeo copy of a ready layout"] = into_a_registry(skopeo_copy, layout, scratch)
        shutil.rmtree(layout)
        if (
            shutil.which("docker")
            and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
        ):
            seconds["docker build + docker push"] = into_a_registry(docker_build_and_push, model, scratch)
        ours = seconds["weightctl bake --to registry"]
        print(f"{size / GIB:g} GiB of random bf16 in four shards, {os.cpu_count()} cores\n")
        rows = [
            (what, f"{time:.2f}", f"{size / 1e6 / time:.0f}", f"{time / ours:.2f}") for what, time in seconds.items()
        ]
        show(("into an empty registry", "seconds", "MB/s", "times weightctl"), rows)

        changed, sent = one_shard_changed(model, scratch)
        shard = max(model.glob("*.safetensors")).stat().st_size
        print(f"one shard of four changed: {changed:.2f} s, {sent} bytes sent for a shard of {shard}\n")

        rows = []
        for what, how, buffered in (
            ("kill -9, docker-registry", signal.SIGKILL, False),
            ("kill -9, docker-registry behind a proxy that takes in whole requests", signal.SIGKILL, True),
            ("Ctrl-C, docker-registry", signal.SIGINT, False),
        ):
            forget()
            blob, before, after = interrupted(one, scratch, how, buffered=buffered)
            rows.append((what, before, after, max(0, before + after - blob)))
        show(("in the middle of a blob of 1 GiB", "sent before", "sent by the rerun", "sent twice"), rows)


if __name__ == "__main__":
    main()
