"""Bake into a registry, against docker build + docker push and skopeo copy of a ready layout; and what a kill costs.

    python -m tests.benchmarks.push_registry [--directory DIR] [--gib 4]

Every row pushes the same model into an empty docker-registry of its own on this machine, as a user would: the start
of the command included. docker build + docker push go through an empty engine of their own (root and dockerd).
Beside them what the machine allows: SHA-256 of the bytes, and the registry fed by the plainest upload there is.
The bytes in the tables are those that the registry's end of the connection saw.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.benchmarks.bake_and_push import SETTLE_SECONDS, make_model
from tests.benchmarks.bake_to_engine import docker_build
from tests.benchmarks.measuring import Step, run, show
from tests.chaos_proxy import ChaosProxy
from tests.services import docker_engine, docker_registry

GIB = 1 << 30
BAKE = (sys.executable, "-m", "weightctl", "bake")


def bake(model: Path, host: str) -> Step:
    """To a registry."""
    return run(*BAKE, model, "--to", "registry", "--tag", f"{host}/model:v1")


def plain_upload(model: Path, host: str) -> Step:
    """Each shard as a blob by one POST and one PUT, all at once; their digests are known before."""
    shards = sorted(model.glob("*.safetensors"))
    return run(sys.executable, "-m", "tests.benchmarks.plain_upload", host, *(f"{at}={sha256(at)}" for at in shards))


def sha256(path: Path) -> str:
    """Of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as source:
        while block := source.read(4 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_all(model: Path) -> Step:
    """One pass of SHA-256 over the model, a thread for each core."""
    before, began = time.process_time(), time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(sha256, sorted(model.iterdir())))
    return Step(time.monotonic() - began, {"python": time.process_time() - before})


def docker_build_and_push(model: Path, host: str) -> Step:
    """Through an engine that is empty before."""
    with docker_engine() as engine:
        build = docker_build(model, engine, f"{host}/model:v1")
        push = run("docker", "push", f"{host}/model:v1", DOCKER_HOST=engine)
        print(f"  (docker build {build.seconds:.2f} s, docker push {push.seconds:.2f} s)")
        return build + push


def skopeo_copy(layout: Path, host: str) -> Step:
    """Of a layout that weightctl baked before, which is not in the time; as it is, not compressed."""
    source, destination = f"oci:{layout}:v1", f"docker://{host}/model:v1"
    return run("skopeo", "copy", "--preserve-digests", "--dest-tls-verify=false", source, destination)


def into_a_registry(push: Callable[[Path, str], Step], source: Path, scratch: Path) -> Step:
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
            return bake(model, proxy.host).seconds, sum(proxy.body_bytes.values())


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
        time.sleep(SETTLE_SECONDS)

        steps = {"weightctl bake --to registry": into_a_registry(bake, model, scratch)}
        steps["the same, digests remembered"] = into_a_registry(bake, model, scratch)
        layout = scratch / "layout"
        run(*BAKE, model, "--to", f"layout:{layout}", "--tag", "model:v1")
        steps["skopeo copy of a ready layout"] = into_a_registry(skopeo_copy, layout, scratch)
        shutil.rmtree(layout)
        steps["docker build + docker push"] = into_a_registry(docker_build_and_push, model, scratch)
        steps["(the plainest upload, digests known)"] = into_a_registry(plain_upload, model, scratch)
        steps["(one pass of SHA-256)"] = hash_all(model)
        ours = steps["weightctl bake --to registry"].seconds
        print(f"{size / GIB:g} GiB of random bf16 in four shards, {os.cpu_count()} cores\n")
        rows = [
            (what, f"{step.seconds:.2f}", f"{size / 1e6 / step.seconds:.0f}", f"{step.seconds / ours:.2f}", step.shares)
            for what, step in steps.items()
        ]
        show(("into an empty registry", "seconds", "MB/s", "times weightctl", "processor seconds"), rows)

        changed, sent = one_shard_changed(model, scratch)
        shard = max(model.glob("*.safetensors")).stat().st_size
        print(f"one shard of four changed: {changed:.2f} s, {sent} bytes sent for a shard of {shard}\n")

        shutil.rmtree(model)

        make_model(one, GIB, shards=1)
        time.sleep(SETTLE_SECONDS)
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
