"""What is left of a push after a power cut, an error or a kill at any of its steps: the old version or the new one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.disk import fork, in_memory, small_disk
from tests.volumes.directory import publish
from weightctl import storage
from weightctl.config import Config
from weightctl.errors import WeightctlError
from weightctl.progress import Progress
from weightctl.volumes import DirectoryVolume, leases

STEPS = ("open", "mkdir", "pwrite", "fsync", "rename", "symlink", "link", "unlink", "rmdir", "utime", "ftruncate")
"""The functions of `os` by which a push changes a volume."""


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with in_memory() as memory:
        monkeypatch.setenv("XDG_CACHE_HOME", str(memory / "cache"))
        (memory / "volume").mkdir()
        yield memory / "volume"


def two_models(directory: Path) -> list[Path]:
    """Two generations that share a file."""
    made = []
    for generation in ("old", "new"):
        model = directory / generation
        (model / "sub").mkdir(parents=True)
        (model / "shared.bin").write_bytes(b"the same in both" * 500)
        (model / "model.bin").write_bytes(generation.encode() * 2000)
        (model / "sub" / "config.json").write_text(generation)
        made.append(model)
    return made


@contextmanager
def watched(volume: Path, step: Callable[[str, Any, Callable[[], Any]], Any]) -> Iterator[None]:
    """Let `step(name, what, call)` make every call of `STEPS` that touches the volume."""
    accessor = getattr(pathlib, "_NormalAccessor", None)  # through which Python 3.10's paths call os
    before = {name: getattr(os, name) for name in STEPS}

    def touches(subject: object) -> bool:
        if isinstance(subject, int):
            subject = os.readlink(f"/proc/self/fd/{subject}")
        return os.fspath(subject).startswith(str(volume))  # type: ignore[call-overload]

    def watch(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            subject = arguments[1] if name in ("symlink", "rename", "link") else arguments[0]
            if not touches(subject):
                return before[name](*arguments, **options)
            return step(name, subject, lambda: before[name](*arguments, **options))

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, watch(name))
            if getattr(accessor, name, None) is before[name]:
                patch.setattr(accessor, name, staticmethod(getattr(os, name)))
        yield


# A power cut.

Content = Any
"""A file's bytes, or a directory's names → inodes, or → the target where it is a link."""


class Disk:
    """What of a volume is durable: of every inode, what it held when it was last synced."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.durable = self.now()

    def now(self) -> dict[int, Content]:
        """Everything as running programs see it."""
        found: dict[int, Content] = {}
        for parent, directories, files in os.walk(self.root):
            entries = {name: Path(parent, name) for name in [*directories, *files]}
            found[os.stat(parent).st_ino] = {
                name: os.readlink(path) if path.is_symlink() else path.stat().st_ino for name, path in entries.items()
            }
            found |= {
                entries[name].stat().st_ino: entries[name].read_bytes()
                for name in files if not entries[name].is_symlink()
            }  # fmt: skip
        return found

    def sync(self, inodes: set[int]) -> None:
        self.durable |= {inode: content for inode, content in self.now().items() if inode in inodes}

    def after_a_cut(self, has_luck: Callable[[int, Content], bool]) -> dict[str, bytes | str | None]:
        """Files and links by path, where of what was not synced only that is left which has luck."""
        now = self.now()

        def left(inode: int) -> Content:
            current = now.get(inode, self.durable.get(inode))
            return current if has_luck(inode, current) else self.durable.get(inode, type(current)())

        def walk(inode: int) -> dict[str, bytes | str | None]:
            tree: dict[str, bytes | str | None] = {}
            for name, child in left(inode).items():
                found = child if isinstance(child, str) else left(child)
                if isinstance(found, dict):
                    tree |= {f"{name}/{below}": each for below, each in walk(child).items()} or {f"{name}/": None}
                else:
                    tree[name] = found
            return tree

        return walk(self.root.stat().st_ino)


def check_state(
    tree: dict[str, bytes | str | None], expected: dict[str, dict[str, bytes]], *, latest: set[str]
) -> None:
    """Every visible version is complete, its manifest too, and the latest one is one of those."""
    visible = {path.split("/")[1] for path in tree if path.startswith("m/") and path != "m/"}
    if "m/latest" in tree:
        assert tree["m/latest"] in latest
        assert tree["m/latest"] in visible
    else:
        assert None in latest
    for version in visible - {"latest"}:
        there = {path.split("/", 2)[2]: data for path, data in tree.items() if path.startswith(f"m/{version}/")}
        assert there == expected[version], version
        manifest = tree[f".weightctl/manifests/m/{version}.json"]
        assert {file["path"] for file in json.loads(manifest or "")["files"]} == set(there)


@pytest.mark.parametrize("together", [False, True], ids=["fsync", "syncfs"])
def test_a_power_cut_after_every_step(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Unsynced writes, names and both are dropped after each step; what is left must be old or new, and whole."""
    old, new = two_models(tmp_path)
    (tmp_path / "try").mkdir()
    versions = {publish(tmp_path / "try", model).version: models.contents(model) for model in (old, new)}
    first, second = versions
    disk = Disk(volume)
    lock = threading.Lock()
    random.seed(1)
    held: list[int] = []
    counts = dict.fromkeys(STEPS, 0)
    allowed: set[Any] = {None, first}

    def check() -> None:
        check_state(disk.after_a_cut(lambda inode, content: False), versions, latest=allowed)
        # Names are journaled in their order; which file's bytes made it is a matter of luck.
        check_state(disk.after_a_cut(lambda inode, content: isinstance(content, dict)), versions, latest=allowed)
        lucky = {inode for inode in disk.now() if random.random() < 0.5}
        check_state(
            disk.after_a_cut(lambda inode, content: isinstance(content, dict) or inode in lucky),
            versions,
            latest=allowed,
        )

    def step(name: str, subject: Any, call: Callable[[], Any]) -> Any:
        with lock:
            if name == "fsync":
                held.append(os.dup(subject))  # so that no other file gets its inode
                disk.sync({os.fstat(subject).st_ino})
            found = call()
            counts[name] += 1
            check()
            return found

    def sync_everything(path: Path) -> bool:
        with lock:
            disk.sync(set(disk.now()))
            check()
        return True

    if together:
        monkeypatch.setattr(storage, "SYNC_TOGETHER", 1)
        monkeypatch.setattr(storage, "_sync_filesystem", sync_everything)
    with watched(volume, step):
        assert publish(volume, old).version == first
        check_state(disk.after_a_cut(lambda inode, content: False), versions, latest={first})
        allowed = {first, second}
        assert publish(volume, new).version == second
        check_state(disk.after_a_cut(lambda inode, content: False), versions, latest={second})
    for descriptor in held:
        os.close(descriptor)
    assert counts["fsync"] > 10
    assert counts["rename"] == 6  # each time the manifest, the version and latest


# Errors.


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_an_error_at_every_step(volume: Path, tmp_path: Path, number: int) -> None:
    old, new = two_models(tmp_path)
    first = publish(volume, old)
    survived = failed = 0
    for turn in range(10_000):
        left = turn

        def step(name: str, subject: Any, call: Callable[[], Any]) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(number, os.strerror(number))
            return call()

        with watched(volume, step):
            try:
                second = publish(volume, new)
                survived += 1
            except WeightctlError as error:
                assert (error.exit_code, bool(error.hint)) == (1, True)  # noqa: PT017
                failed += 1
        there = DirectoryVolume(volume)
        for version in there.contents():
            assert there.check("m", version.version, config=Config(), progress=Progress()).problems == ()
        assert there.resolve("m").name in (first.version, publish(volume, new).version)
        if left >= 0:
            break
        second = publish(volume, new)
        assert models.contents(second.path) == models.contents(new)
        publish(volume, old)
        DirectoryVolume(volume).prune(keep=1, progress=Progress())
    assert failed > 20
    assert not list((volume / ".weightctl" / "staging").iterdir())


def test_a_mount_that_vanishes_at_every_step(tmp_path: Path) -> None:
    old, new = two_models(tmp_path)
    said = set()
    for turn in range(0, 10_000, 3):
        left = turn
        with small_disk(tmp_path / "volume", 4 << 20) as volume:
            publish(volume, old)
            inside = os.open(volume, os.O_RDONLY)

            def step(name: str, subject: Any, call: Callable[[], Any]) -> Any:
                nonlocal left
                left -= 1
                if left == -1:
                    subprocess.run(["umount", "--lazy", volume], check=True)
                return call()

            with watched(volume, step):
                try:
                    publish(volume, new)
                except WeightctlError as error:
                    assert error.exit_code == 1  # noqa: PT017
                    said.add(error.message)
            real = Path(f"/proc/self/fd/{inside}")
            assert models.contents(real / "m" / os.readlink(real / "m" / "latest")) in [
                models.contents(old), models.contents(new),
            ]  # fmt: skip
            os.close(inside)
            if left >= 0:
                break
            assert not list(volume.glob("m/*"))  # nothing is published below the mount point
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", volume], check=True)  # which small_disk unmounts
    assert turn > 40
    assert f"the volume {tmp_path / 'volume'} is no longer mounted there" in said


# Kills.

READER = """
import hashlib, json, os, pathlib, sys, time
latest, looks = pathlib.Path(sys.argv[1]) / "m" / "latest", 0
while not (latest.parent.parent / "stop").exists():
    path = latest.parent / os.readlink(latest)
    try:
        index = json.loads((path / "index.json").read_bytes())
        found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in index}
    except FileNotFoundError:
        assert os.readlink(latest) != path.name, path  # pruned meanwhile
        continue
    assert found == index, path
    looks += 1
    time.sleep(0.005)
print(looks)
"""


def write_generation(model: Path, number: int, shards: int = 4, size: int = 200_000) -> Path:
    """A model that can be checked without knowing it: its index holds the hashes of its files, of which one changes."""
    model.mkdir(exist_ok=True)
    for shard in range(shards):
        path = model / f"{shard}.bin"
        if shard == number % shards or not path.exists():
            path.write_bytes(hashlib.shake_128(f"{number} {shard}".encode()).digest(size))
    files = [model / f"{shard}.bin" for shard in range(shards)]
    index = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (model / "index.json").write_text(json.dumps(index))
    return model


def test_two_hundred_kills(volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at random moments of a push, while readers poll and hash; each time a second push completes."""
    monkeypatch.setattr(leases, "NAMELESS_SECONDS", 0.2)  # who was killed before it wrote its name is not waited for
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    random.seed(4)
    model = write_generation(tmp_path / "m", 0)
    publish(volume, model)
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(volume)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, longest = 0, 0.05
    for number in range(1, 10_000):
        write_generation(model, number)
        child = fork(lambda: publish(volume, model) and None)
        time.sleep(random.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        before = DirectoryVolume(volume).resolve("m").name
        began = time.monotonic()
        published = publish(volume, model)
        if before != published.version and published.copied_bytes:
            longest = 0.9 * longest + 0.1 * min(1.2 * (time.monotonic() - began), 0.5)
        assert models.contents(published.path) == models.contents(model)
        assert not list((volume / ".weightctl" / "staging").iterdir())
        if killed == 200:
            break
        if not number % 20:
            DirectoryVolume(volume).prune(keep=20, progress=Progress())
    (volume / "stop").touch()
    looks = [int(reader.communicate()[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0]
    assert min(looks) > 10
    for version in DirectoryVolume(volume).versions("m")[::20]:
        assert DirectoryVolume(volume).check("m", version, config=Config(), progress=Progress()).problems == ()
