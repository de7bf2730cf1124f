"""Bake into a Docker engine, against docker build with the same COPY; one changed shard; and what a kill costs.

    python -m tests.benchmarks.bake_to_engine [--directory DIR] [--gib 4] [--rounds 1]

Needs root and dockerd: every row has an engine of its own, with nothing in it. Takes as much disk as five models.
Bytes sent are those that passed the engine's socket.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.bake_and_push import SETTLE_SECONDS, make_model
from tests.benchmarks.measuring import Step, run, show
from tests.services import docker_engine

GIB = 1 << 30
BAKE = (sys.executable, "-m", "weightctl", "bake")


class Relay:
    """A socket before the engine's that counts what the engine is sent, and holds it back after `hold_after` bytes."""

    def __init__(self, engine: str, directory: Path) -> None:
        self.sent = 0
        self.hold_after = 0
        self.held, self.go_on = threading.Event(), threading.Event()
        self._engine = engine.removeprefix("unix://")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "relay"))
        self._listener.listen()
        self.host = f"unix://{directory / 'relay'}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client = self._listener.accept()[0]
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(self._engine)
            for source, destination, count in ((client, engine, True), (engine, client, False)):
                threading.Thread(target=self._pass_on, args=(source, destination, count), daemon=True).start()

    def _pass_on(self, source: socket.socket, destination: socket.socket, count: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                destination.sendall(data)
                self.sent += len(data) * count
                if count and 0 < self.hold_after <= self.sent:
                    self.held.set()
                    self.go_on.wait()
            destination.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relayed_engine() -> Iterator[tuple[str, Relay]]:
    """An engine, and a relay before it."""
    with docker_engine() as engine, tempfile.TemporaryDirectory() as directory:
        yield engine, Relay(engine, Path(directory))


def bake(model: Path, engine: str) -> Step:
    """Into the engine."""
    return run(*BAKE, model, "--to", "docker", "--tag", "model:v1", DOCKER_HOST=engine)


def docker_build(model: Path, engine: str, tag: str = "model:v1", buildkit: str = "0") -> Step:
    """By one of the engine's two builders; one COPY for each shard, so that a changed shard is a changed layer."""
    names = ["config.json", *sorted(path.name for path in model.glob("*.safetensors"))]
    dockerfile = model.parent / "Dockerfile"
    dockerfile.write_text("\n".join(["FROM scratch", *(f"COPY {name} /models/model/" for name in names), ""]))
    command = (docker(), "build", "--file", dockerfile, "--tag", tag, model)
    return run(*command, DOCKER_HOST=engine, DOCKER_BUILDKIT=buildkit)


def docker() -> str:
    """The engine's own command where there are several: it brings the client's half of BuildKit."""
    own = Path("/usr/bin/docker")
    return str(own) if own.exists() else "docker"


def into_fresh_engines(model: Path, rounds: int) -> dict[str, list[Step]]:
    """Every way, round by round."""
    ways: dict[str, Callable[[Path, str], Step]] = {
        "weightctl bake --to docker": bake,
        "docker build": docker_build,
        "docker build, BuildKit": functools.partial(docker_build, buildkit="1"),
    }
    found: dict[str, list[Step]] = {}
    for _ in range(rounds):
        for what, into in ways.items():
            forget()
            time.sleep(SETTLE_SECONDS)
            with docker_engine() as engine:
                try:
                    found.setdefault(what, []).append(into(model, engine))
                except subprocess.CalledProcessError as error:
                    print(f"{what} failed: {error.stderr.decode()[-300:]}")
    return {what: steps for what, steps in found.items() if steps}


def changed_shards(model: Path) -> list[tuple[str, str, int, int]]:
    """Seconds, bytes written and bytes sent of a second bake, after the last and then the first shard has changed."""
    rows = []
    with relayed_engine() as (engine, relay):
        bake(model, engine)
        for what, which in (("the last shard of four", -1), ("the first shard of four", 0)):
            with sorted(model.glob("*.safetensors"))[which].open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(os.urandom(1))
            time.sleep(SETTLE_SECONDS)
            before, began = relay.sent, time.monotonic()
            command = [*map(str, (*BAKE, model, "--to", "docker", "--tag", "model:v1", "--json"))]
            variables = {**os.environ, "DOCKER_HOST": relay.host}
            done = subprocess.run(command, env=variables, capture_output=True, check=True)
            seconds = f"{time.monotonic() - began:.2f}"
            rows.append((what, seconds, json.loads(done.stdout)["written_bytes"], relay.sent - before))
    return rows


def interrupted(model: Path, after: int) -> tuple[int, int]:
    """The bytes that had been sent when a bake was killed, and those sent by the rerun."""
    forget()
    with relayed_engine() as (engine, relay):
        command = [*map(str, (*BAKE, model, "--to", "docker", "--tag", "model:v1"))]
        relay.hold_after = after
        killed = subprocess.Popen(
            command, env={**os.environ, "DOCKER_HOST": relay.host}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        relay.held.wait()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        before, relay.hold_after = relay.sent, 0
        relay.go_on.set()
        run(*command, DOCKER_HOST=relay.host)
        subprocess.run(["docker", "--host", engine, "inspect", "model:v1"], stdout=subprocess.DEVNULL, check=True)
        return before, relay.sent - before


def forget() -> None:
    """Nothing is remembered of what was hashed before."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def main() -> None:
    """Make the model, bring it into engines, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="scratch space, the engines' too (default: the temporary one)")
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    if options.directory:
        tempfile.tempdir = str(options.directory)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
        model, size = scratch / "model", int(options.gib * GIB)
        make_model(model, size)
        print(f"{size / GIB:g} GiB of random bf16 in four shards, {os.cpu_count()} cores\n")
        steps = into_fresh_engines(model, options.rounds)
        medians = {what: statistics.median(step.seconds for step in each) for what, each in steps.items()}
        ours = medians["weightctl bake --to docker"]
        rows = []
        for what, each in steps.items():
            runs = " ".join(f"{step.seconds:.2f}" for step in each)
            speed, ratio = f"{size / 1e6 / medians[what]:.0f}", f"{medians[what] / ours:.2f}"
            rows.append((what, runs, speed, ratio, each[0].shares))
        show(("into an empty engine", "seconds", "MB/s", "times weightctl", "processor seconds, first round"), rows)
        show(("changed", "seconds", "bytes written", "bytes sent"), changed_shards(model))
        shutil.rmtree(model)

        six, size = scratch / "six", size * 3 // 4
        make_model(six, size, shards=6)
        time.sleep(SETTLE_SECONDS)
        before, again = interrupted(six, size * 3 // 4)
        what = f"at three quarters of {size / GIB:g} GiB in six shards"
        show(("kill -9", "sent before", "sent by the rerun"), [(what, before, again)])


if __name__ == "__main__":
    main()
