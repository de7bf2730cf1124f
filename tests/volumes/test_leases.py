"""A lease is held by one living process, wherever it runs, and by nobody once that is dead."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests import models
from tests.disk import fork, lacking, small_disk
from tests.volumes.directory import write_lease
from weightctl.volumes import leases


@pytest.fixture
def lease(tmp_path: Path) -> Path:
    return tmp_path / "x.lease"


def age(lease: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lease, (then, then))


def can_be_had(lease: Path) -> bool:
    try:
        with leases.held(lease, wait=False):
            return True
    except BlockingIOError:
        return False


def test_one_at_a_time(lease: Path) -> None:
    with leases.held(lease):
        assert str(leases.owner_of(lease)) == f"{os.uname().nodename}:{os.getpid()}"
        assert not can_be_had(lease)
    assert leases.owner_of(lease) is None
    assert not lease.exists()
    assert can_be_had(lease)


def test_whoever_waits_is_told_once_and_gets_it(lease: Path) -> None:
    told: list[int] = []

    def wait() -> None:
        with leases.held(lease, on_wait=lambda: told.append(1)):
            told.append(2)

    waiting = threading.Thread(target=wait)
    with leases.held(lease):
        waiting.start()
        models.wait_for(lambda: told)
        time.sleep(3 * leases.POLL_SECONDS)
        assert told == [1]
    waiting.join()
    assert told == [1, 2]


@pytest.mark.parametrize("without", [(), ("flock",)], ids=["locks", "no locks"])
def test_what_a_killed_process_held(lease: Path, without: tuple[str, ...]) -> None:
    """Its lock tells at once; without locks its silence does."""

    def hold() -> None:
        if without:
            lacking(*without)
        with leases.held(lease):
            time.sleep(100)

    child = fork(hold)
    models.wait_for(lambda: lease.exists() and lease.stat().st_size == 512)
    assert not can_be_had(lease)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if without:
        assert not can_be_had(lease)
        age(lease, leases.SILENCE_SECONDS + 1)
    assert leases.owner_of(lease) is None
    assert can_be_had(lease)


@pytest.mark.parametrize("locked", [True, False])
def test_a_living_process_on_another_host_is_not_taken_for_dead(lease: Path, locked: bool) -> None:
    write_lease(lease, locked=locked)
    for silent in (0, leases.HEARTBEAT_SECONDS, leases.SILENCE_SECONDS / 2):
        age(lease, silent)
        assert str(leases.owner_of(lease)) == "elsewhere:4711"
        assert not can_be_had(lease)
    assert json.loads(lease.read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("locked", [True, False])
def test_a_dead_process_on_another_host_expires(lease: Path, locked: bool) -> None:
    write_lease(lease, locked=locked)
    age(lease, leases.SILENCE_SECONDS + 1)
    assert leases.owner_of(lease) is None
    assert can_be_had(lease)


def test_another_mount_on_this_machine_is_another_host(lease: Path) -> None:
    """Two FUSE mounts of one volume share the kernel but no locks."""
    lease.touch()
    mount = f"{leases._boot()} {lease.stat().st_dev}"
    write_lease(lease, mount=mount + "1")
    assert not can_be_had(lease)
    write_lease(lease, mount=mount)
    assert can_be_had(lease)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 512])
def test_a_lease_without_a_name_is_left_to_its_owner_for_a_moment(
    lease: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "NAMELESS_SECONDS", 300)
    lease.write_text(content)
    assert str(leases.owner_of(lease)) == "?:0"
    assert not can_be_had(lease)
    age(lease, leases.NAMELESS_SECONDS + 1)
    assert leases.owner_of(lease) is None
    assert can_be_had(lease)


def test_a_clock_that_is_wrong_here_kills_nobody(lease: Path) -> None:
    """A heartbeat from the future is not silence."""
    write_lease(lease)
    age(lease, -3600)
    assert not can_be_had(lease)


def test_two_who_take_over_a_silent_lease(lease: Path) -> None:
    """Without locks both write their names; one of them stands."""
    write_lease(lease, locked=False)
    age(lease, leases.SILENCE_SECONDS + 1)
    holding = lease.parent / "holding"
    holding.mkdir()

    def take() -> None:
        lacking("flock")
        try:
            with leases.held(lease, wait=False):
                (holding / str(os.getpid())).touch()
                time.sleep(2 * leases.SETTLE_SECONDS)
        except BlockingIOError:
            pass

    children = [fork(take) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert len(list(holding.iterdir())) == 1


def test_a_holder_beats(lease: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    with leases.held(lease):
        age(lease, 1000)
        models.wait_for(lambda: time.time() - lease.stat().st_mtime < 500)
        assert not can_be_had(lease)
        assert leases.owner_of(lease)


def test_whoever_was_taken_for_dead_leaves_the_lease_to_its_new_owner(lease: Path) -> None:
    """As a host that was suspended for longer than its silence is borne."""
    with leases.held(lease):
        write_lease(lease, host="another")
    assert str(leases.owner_of(lease)) == "another:4711"
    assert not can_be_had(lease)


def test_whoever_looks_does_not_keep_a_new_owner_out(lease: Path) -> None:
    """To look is to take the lock for a moment."""

    def look() -> None:
        while True:
            leases.owner_of(lease)

    watchers = [fork(look) for _ in range(2)]
    try:
        assert all(can_be_had(lease) for _ in range(300))
    finally:
        for watcher in watchers:
            os.kill(watcher, signal.SIGKILL)
            os.waitpid(watcher, 0)


def test_a_link_in_the_place_of_a_lease_is_not_followed(lease: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    age(tmp_path / "precious", 1000)
    lease.symlink_to(tmp_path / "precious")
    for ask in (leases.owner_of, can_be_had):
        with pytest.raises(OSError, match="symbolic link"):
            ask(lease)
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_lock_alone_holds_a_lease_that_has_no_room(tmp_path: Path) -> None:
    """Whoever makes room on a full disk has to hold one."""
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        with pytest.raises(OSError, match="No space"):
            (disk / "all of it").write_bytes(bytes(128 << 10))
        with leases.held(disk / "x.lease"):
            assert not can_be_had(disk / "x.lease")
        assert [path.name for path in disk.iterdir()] == ["all of it"]


def test_a_lease_that_is_let_go_at_this_moment_is_not_taken(lease: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is gone: another may have made, and taken, the next one."""
    lease.touch()
    write_lease(lease, mount=f"{leases._boot()} {lease.stat().st_dev}")
    lock = leases._lock

    def let_go_and_lock(descriptor: int, *, wait: bool) -> bool | None:
        lease.unlink()
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(leases, "_lock", let_go_and_lock)
    assert leases._acquire(lease) is None


def test_of_two_who_take_over_the_last_one_stands(lease: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lease(lease, locked=False)
    age(lease, leases.SILENCE_SECONDS + 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: write_lease(lease, host="another"))  # while we settle
    assert leases._acquire(lease) is None
    assert str(leases.owner_of(lease)) == "another:4711"
