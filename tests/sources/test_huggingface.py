"""The Hub as a source: what it lists, what is fetched, and what is believed."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.disk import as_ordinary_user, read_only_directory
from tests.hub_server import Fault, Hub, git_blob_id
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.model import Reference, Snapshot
from weightctl.progress import Progress, Task
from weightctl.sources import Plan, sources

WEIGHTS = "model.safetensors"
MODEL = {"config.json": b"{}", "empty": b"", "sub dir/ünder ☃.json": b"[]", WEIGHTS: b"weights" * 1000}
CONFIG = Config(workers=2)


class Recorder(Progress):
    """Counts the bytes reported under each description, and keeps the notes."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.notes: list[str] = []

    def task(self, description: str, total: int) -> Task:
        self.totals[description] = total
        done = self.done
        done[description] = 0

        class Counter(Task):
            def advance(self, amount: int) -> None:
                done[description] += amount

        return Counter()

    def note(self, message: str) -> None:
        self.notes.append(message)


def planned(
    model: str = "org/name", include: Sequence[str] = (), exclude: Sequence[str] = (), to: Path | None = None
) -> Plan:
    source = sources.get("huggingface")()
    return source.plan(
        Reference.parse(model), include=include, exclude=exclude, to=to, config=CONFIG, progress=Progress()
    )


def fetched(
    model: str = "org/name",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    to: Path | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Snapshot:
    plan = planned(model, include, exclude, to)
    return sources.get("huggingface")().fetch(plan, verify=verify, config=CONFIG, progress=progress or Progress())


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    """Path → bytes, read where each file's `source` says."""
    return {file.path: file.source.read_bytes() for file in snapshot.files}


def paths(snapshot: Snapshot) -> list[str]:
    return [file.path for file in snapshot.files]


def test_a_plan_lists_sizes_and_digests_and_moves_nothing(hub: Hub, home: Path) -> None:
    commit = hub.add("org/name", MODEL)
    plan = planned()
    assert paths(plan.snapshot) == sorted(MODEL)
    assert [file.size for file in plan.snapshot.files] == [len(MODEL[path]) for path in sorted(MODEL)]
    assert (plan.snapshot.repo_id, plan.snapshot.revision, plan.snapshot.commit) == ("org/name", "main", commit)
    assert plan.missing == plan.snapshot.files
    weights, config = plan.snapshot.file(WEIGHTS), plan.snapshot.file("config.json")
    assert weights
    assert config
    assert (weights.sha256, weights.git_id) == (hashlib.sha256(MODEL[WEIGHTS]).hexdigest(), None)
    assert (config.sha256, config.git_id) == (None, git_blob_id(b"{}"))
    assert hub.fetched() == {}
    assert not (home / "hf").exists()


def test_fetching_brings_every_file_and_hashes_it(hub: Hub) -> None:
    hub.add("org/name", MODEL)
    progress = Recorder()
    snapshot = fetched(progress=progress)
    assert contents(snapshot) == MODEL
    assert {f.path: f.sha256 for f in snapshot.files} == {p: hashlib.sha256(c).hexdigest() for p, c in MODEL.items()}
    assert not any(file.source.is_symlink() for file in snapshot.files)
    total = sum(map(len, MODEL.values()))
    assert progress.totals == progress.done == {"downloading": total, "verifying": total}
    assert planned().missing == ()


def test_a_repository_without_an_organisation(hub: Hub) -> None:
    hub.add("gpt2", MODEL)
    assert contents(fetched("gpt2")) == MODEL


def test_a_listing_of_many_pages(hub: Hub) -> None:
    files = {f"{n % 7}/{n:03}.json": b"%d" % n for n in range(60)}
    hub.add("org/name", files)
    assert contents(fetched()) == files


def test_revisions(hub: Hub) -> None:
    old = hub.add("org/name", {"config.json": b"old"}, "v1.0", "refs/pr/1")
    new = hub.add("org/name", {"config.json": b"new"}, "main", "feature/x")
    assert contents(fetched("org/name")) == {"config.json": b"new"}
    for revision, commit, content in [
        ("v1.0", old, b"old"), ("refs/pr/1", old, b"old"), (old, old, b"old"), ("feature/x", new, b"new")
    ]:  # fmt: skip
        snapshot = fetched(f"org/name@{revision}")
        assert contents(snapshot) == {"config.json": content}
        assert (snapshot.revision, snapshot.commit) == (revision, commit)


def test_a_new_commit_brings_only_what_changed(hub: Hub) -> None:
    hub.add("org/name", MODEL)
    fetched()
    hub.add("org/name", {**MODEL, "config.json": b'{"new": 1}'})
    hub.requests.clear()
    assert [file.path for file in planned().missing] == ["config.json"]
    assert contents(fetched())["config.json"] == b'{"new": 1}'
    assert set(hub.fetched()) == {"config.json"}


def test_the_branch_follows_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("org/name", {"config.json": b"old"})
    fetched()
    new = hub.add("org/name", {"config.json": b"new"})
    fetched()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert planned().snapshot.commit == new


def test_include_and_exclude(hub: Hub) -> None:
    hub.add("org/name", MODEL)
    assert paths(fetched(include=["*.json"])) == ["config.json", "sub dir/ünder ☃.json"]
    assert set(hub.fetched()) == {"config.json", "sub dir/ünder ☃.json"}
    assert paths(fetched(include=["*.json"], exclude=["sub dir/"])) == ["config.json"]
    assert paths(fetched(exclude=["*.json", "empty"])) == [WEIGHTS]
    with pytest.raises(UsageError, match="no files in org/name"):
        fetched(include=["*.gguf"])


def test_names_that_hold_the_signs_of_patterns(hub: Hub) -> None:
    files = {"[a].json": b"1", "a.json": b"2", "*.json": b"3", "?.json": b"4", "[!a]": b"5", "100%?#&+.json": b"6"}
    hub.add("org/name", files)
    assert contents(fetched(include=["[[]a].json"])) == {"[a].json": b"1"}
    assert set(hub.fetched()) == {"[a].json"}
    assert contents(fetched()) == files


@pytest.mark.parametrize("path", ["../evil", "a/../../evil", "/evil", "a//evil", "./evil", "a/..", "\0"])
@pytest.mark.parametrize("to", [False, True])
def test_paths_that_leave_the_model_are_refused(hub: Hub, tmp_path: Path, home: Path, path: str, to: bool) -> None:
    hub.add("org/name", {"config.json": b"{}", path: b"evil"})
    with pytest.raises(IntegrityError, match="leads outside of it or nowhere"):
        fetched(to=tmp_path / "there" if to else None)
    assert hub.fetched() == {}
    assert not list(home.rglob("evil"))
    assert not list(tmp_path.rglob("evil"))


def test_to_a_directory_lie_plain_files(hub: Hub, tmp_path: Path, home: Path) -> None:
    hub.add("org/name", MODEL)
    there = tmp_path / "my models" / "ünder"
    snapshot = fetched(to=there)
    assert snapshot.root == there
    assert {path: (there / path).read_bytes() for path in MODEL} == MODEL
    assert not any((there / path).is_symlink() for path in MODEL)
    assert planned(to=there).missing == ()
    assert not list((home / "hf").rglob(WEIGHTS))


def test_a_link_in_the_directory_to_pull_to_leads_nobody_to_remove_what_it_points_at(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", MODEL)
    precious = tmp_path / "precious.json"
    precious.write_bytes(b"[]")
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").symlink_to(precious)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        fetched(to=there)
    assert precious.read_bytes() == b"[]"
    assert contents(fetched(to=there)) == MODEL
    assert precious.read_bytes() == b"[]"


@pytest.mark.parametrize("path", [WEIGHTS, "config.json", "sub dir/ünder ☃.json"])
def test_wrong_bytes_are_named_removed_and_fetched_anew(hub: Hub, home: Path, path: str) -> None:
    hub.add("org/name", MODEL)
    hub.faults[path] = Fault(flip_at=0, times=1)
    with pytest.raises(IntegrityError, match=path) as caught:
        fetched()
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert [file.path for file in planned().missing] == [path]
    assert contents(fetched()) == MODEL


def test_every_wrong_file_is_named(hub: Hub) -> None:
    hub.add("org/name", MODEL)
    hub.faults.update(dict.fromkeys([WEIGHTS, "config.json"], Fault(flip_at=0, times=1)))
    with pytest.raises(IntegrityError, match=rf"config\.json, {WEIGHTS}"):
        fetched()


def test_small_files_are_checked_even_when_large_ones_are_left_to_whoever_reads_them(hub: Hub) -> None:
    hub.add("org/name", MODEL)
    hub.faults[WEIGHTS] = Fault(flip_at=0, times=1)
    snapshot = fetched(verify=False)
    assert all(file.sha256 == hashlib.sha256(MODEL[file.path]).hexdigest() for file in snapshot.files)
    assert contents(snapshot)[WEIGHTS] != MODEL[WEIGHTS]
    with pytest.raises(IntegrityError):
        fetched()
    hub.faults["config.json"] = Fault(flip_at=0)
    hub.add("org/other", MODEL)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        fetched("org/other", verify=False)


@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize("size", [0, 100, 8000])
def test_a_file_of_the_wrong_size_is_fetched_anew(hub: Hub, tmp_path: Path, to: bool, size: int) -> None:
    there = tmp_path / "there" if to else None
    hub.add("org/name", MODEL)
    source = next(file.source for file in fetched(to=there).files if file.path == WEIGHTS)
    os.truncate(source, size)
    assert [file.path for file in planned(to=there).missing] == [WEIGHTS]
    assert contents(fetched(to=there)) == MODEL


def stale(hub: Hub, home: Path) -> tuple[Path, Path]:
    """A partial file as a killed download leaves it, and its lock, which nobody holds."""
    hub.add("org/name", MODEL)
    name = hashlib.sha256(MODEL[WEIGHTS]).hexdigest()
    partial = home / "hf" / "hub" / "models--org--name" / "blobs" / f"{name}.0123abcd.incomplete"
    lock = home / "hf" / "hub" / ".locks" / "models--org--name" / f"{name}.lock"
    for path in (partial, lock):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    return partial, lock


def test_partial_files_of_killed_downloads_are_swept(hub: Hub, home: Path) -> None:
    partial, _ = stale(hub, home)
    assert contents(fetched()) == MODEL
    assert not partial.exists()


def test_the_partial_file_of_a_living_download_is_left_alone(hub: Hub, home: Path) -> None:
    partial, lock = stale(hub, home)
    with lock.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        fetched(include=["*.json"])
    assert partial.exists()


def test_without_an_answer_the_whole_of_a_cached_model_will_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("org/name", MODEL)
    online = fetched()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    progress = Recorder()
    source = sources.get("huggingface")()
    plan = source.plan(Reference.parse("org/name"), config=CONFIG, progress=progress)
    assert "as it is cached" in progress.notes[0]
    assert plan.missing == ()
    assert source.fetch(plan, verify=True, config=CONFIG, progress=Progress()).digest == online.digest


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_a_damaged_cache_is_noticed_without_an_answer_too(hub: Hub, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    from huggingface_hub import constants

    hub.add("org/name", MODEL)
    source = next(file.source for file in fetched().files if file.path == path)
    source.write_bytes(MODEL[path][:-1] + b"?")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(IntegrityError, match=path):
        fetched()


def test_a_hub_that_accepts_and_never_answers_is_not_waited_for_forever(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    hub.add("org/name", MODEL)
    hub.faults["/api/"] = Fault(stall_at=0)
    with pytest.raises(WeightctlError, match="cannot be reached") as caught:
        planned()
    assert caught.value.hint


def test_a_cache_that_cannot_be_written(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("org/name", MODEL)
    with read_only_directory() as directory:
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "token"))

        def attempt() -> None:
            config = Config(cache_dir=directory / "hub")
            source = sources.get("huggingface")()
            plan = source.plan(Reference.parse("org/name"), config=config, progress=Progress())
            with pytest.raises(WeightctlError, match="Permission denied") as caught:
                source.fetch(plan, verify=True, config=config, progress=Progress())
            assert caught.value.hint

        as_ordinary_user(attempt)
        assert os.listdir(directory) == []
