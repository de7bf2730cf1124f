"""A model in a directory: followed through its links, and never out of itself."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from tests.disk import as_ordinary_user, open_to_all
from tests.hub_server import git_blob_id
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.model import Reference, Snapshot
from weightctl.progress import Progress
from weightctl.sources import sources

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Notes(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def listed(directory: Path | str, progress: Progress | None = None, **options: object) -> Snapshot:
    source = sources.get("directory")()
    reference = Reference("directory", str(directory))
    return source.plan(reference, config=Config(), progress=progress or Progress(), **options).snapshot  # type: ignore[arg-type]


def fetched(directory: Path, *, verify: bool = True) -> Snapshot:
    source = sources.get("directory")()
    plan = source.plan(Reference("directory", str(directory)), config=Config(), progress=Progress())
    assert plan.missing == ()
    return source.fetch(plan, verify=verify, config=Config(), progress=Progress())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Names with spaces and unicode, a directory, an empty file."""
    root = tmp_path / "my model"
    (root / "ünder ☃").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "ünder ☃" / "a b.bin").write_bytes(b"12345")
    (root / "empty").touch()
    return root


@pytest.fixture(params=["own blobs", "shared blobs"])
def cached(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A snapshot in the Hub's cache, with one LFS file and a small one.

    huggingface_hub 2 keeps the bytes of Xet files once for all repositories, and a link to them in each.
    """
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    for path, content, name in [
        ("model.safetensors", b"weights", hashlib.sha256(b"weights").hexdigest()),
        ("sub/config.json", b"{}", git_blob_id(b"{}")),
    ]:
        (repository / "blobs" / name).write_bytes(content)
        link = snapshot / path
        link.symlink_to(os.path.relpath(repository / "blobs" / name, link.parent))
    if request.param == "shared blobs":
        own = (snapshot / "model.safetensors").resolve()
        shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
        shared.parent.mkdir(parents=True)
        own.rename(shared)
        own.symlink_to(os.path.relpath(shared, own.parent))
    return snapshot


def test_every_file_is_listed_in_order(model: Path) -> None:
    snapshot = listed(model)
    assert [(file.path, file.size) for file in snapshot.files] == [
        ("config.json", 2), ("empty", 0), ("ünder ☃/a b.bin", 5)
    ]  # fmt: skip
    assert (snapshot.name, snapshot.root, snapshot.commit) == ("my model", model, None)
    assert all(file.sha256 is None for file in snapshot.files)


def test_fetching_hashes_every_file(model: Path) -> None:
    files = {file.path: file.sha256 for file in fetched(model).files}
    assert files["ünder ☃/a b.bin"] == hashlib.sha256(b"12345").hexdigest()
    assert files["empty"] == hashlib.sha256().hexdigest()
    assert all(file.sha256 is None for file in fetched(model, verify=False).files)


def test_include_and_exclude(model: Path) -> None:
    assert [file.path for file in listed(model, include=["*.json", "*.bin"], exclude=["ü*"]).files] == ["config.json"]
    with pytest.raises(UsageError, match="no files") as caught:
        listed(model, include=["*.gguf"])
    assert "--include" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "what"), [("missing", "does not exist"), ("my model/config.json", "is not a directory")]
)
def test_no_directory(model: Path, name: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        listed(model.parent / name)


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no files"):
        listed(tmp_path)


def test_to_is_for_the_hub(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is here already"):
        listed(model, to=tmp_path / "there")


def test_the_working_directory_is_a_model_with_a_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert listed(".").name == "my model"
    monkeypatch.chdir(model / "ünder ☃")
    assert listed("..").name == "my model"


def test_records_of_other_tools_are_left_out_aloud(model: Path) -> None:
    for path in (".git/HEAD", ".cache/huggingface/download/config.json.metadata", ".cache/mine"):
        (model / path).parent.mkdir(parents=True, exist_ok=True)
        (model / path).write_text("x")
    notes = Notes()
    assert ".cache/mine" in [file.path for file in listed(model, notes).files]
    assert len(listed(model).files) == 4
    assert len(notes.notes) == 2


def test_links_inside_the_model_are_followed(model: Path) -> None:
    (model / "link.bin").symlink_to("ünder ☃/a b.bin")
    (model / "linked").symlink_to("ünder ☃")
    snapshot = listed(model)
    paths = [file.path for file in snapshot.files]
    assert "link.bin" in paths
    assert "linked/a b.bin" in paths
    link = snapshot.file("link.bin")
    assert link
    assert not link.source.is_symlink()


def test_the_model_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    assert len(listed(tmp_path / "alias").files) == 3


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "../outside.txt", "ünder ☃/../../outside.txt"])
def test_links_that_leave_the_model_are_refused(model: Path, target: str) -> None:
    (model.parent / "outside").mkdir()
    (model.parent / "outside.txt").touch()
    (model / "link").symlink_to(target)
    with pytest.raises(IntegrityError, match="link that leaves the model"):
        listed(model)


def test_a_neighbour_whose_name_begins_alike_is_outside(model: Path) -> None:
    neighbour = model.parent / (model.name + " too")
    neighbour.mkdir()
    (neighbour / "x").touch()
    (model / "link").symlink_to(neighbour / "x")
    with pytest.raises(IntegrityError, match="leaves the model"):
        listed(model)


@pytest.mark.parametrize("target", ["nowhere", "link", "config.json/x"])
def test_links_to_nothing_are_refused(model: Path, target: str) -> None:
    (model / "link").symlink_to(target)
    with pytest.raises(IntegrityError, match="link to nothing"):
        listed(model)


def test_a_link_that_may_not_be_followed_is_not_taken_for_one_to_nothing(model: Path) -> None:
    (model / "inside").mkdir()
    (model / "a link").symlink_to("inside/file")
    open_to_all(model)
    (model / "inside").chmod(0o700)

    def read() -> None:
        with pytest.raises(WeightctlError, match=r"Permission denied \(.*inside/file\)"):
            listed(model)

    as_ordinary_user(read)


def test_cycles_are_refused(model: Path) -> None:
    (model / "ünder ☃" / "up").symlink_to("..")
    with pytest.raises(IntegrityError, match="a directory above it"):
        listed(model)


def test_links_that_multiply_are_refused_or_finite(model: Path) -> None:
    (model / "a").mkdir()
    (model / "b").mkdir()
    (model / "a" / "to b").symlink_to("../b")
    (model / "b" / "to a").symlink_to("../a")
    with pytest.raises(IntegrityError, match="a directory above it"):
        listed(model)


def test_pipes_sockets_and_devices_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(model / "pipe")
    with pytest.raises(IntegrityError, match="neither a file nor a directory"):
        listed(model)
    (model / "pipe").unlink()
    monkeypatch.chdir(model)  # a socket's name has to be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(IntegrityError, match="neither a file nor a directory"):
            listed(model)
    (model / "socket").unlink()
    (model / "device").symlink_to("/dev/zero")
    with pytest.raises(IntegrityError, match="leaves the model"):
        listed(model)
    (model / "device").unlink()
    if os.geteuid() == 0:
        try:
            os.mknod(model / "device", 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:  # in some containers even root may not
            return
        with pytest.raises(IntegrityError, match="neither a file nor a directory"):
            listed(model)


def test_a_name_that_is_no_unicode_is_no_traceback(model: Path) -> None:
    (model / os.fsdecode(b"\xff")).write_text("x")
    try:
        fetched(model).digest  # noqa: B018
    except WeightctlError as error:
        str(error).encode()


def test_a_snapshot_in_the_hubs_cache_knows_what_it_is(cached: Path) -> None:
    snapshot = listed(cached)
    assert (snapshot.name, snapshot.repo_id, snapshot.commit) == ("org/name", "org/name", COMMIT)
    weights = snapshot.file("model.safetensors")
    assert weights
    assert weights.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert not weights.source.is_symlink()


def test_a_model_may_not_link_to_shared_blobs_from_elsewhere(model: Path) -> None:
    (model.parent / "blobs").mkdir()
    (model.parent / "blobs" / "secret").touch()
    (model / "link").symlink_to("../blobs/secret")
    with pytest.raises(IntegrityError, match="leaves the model"):
        listed(model)


def test_a_damaged_file_in_the_hubs_cache_is_noticed(cached: Path) -> None:
    assert fetched(cached).digest
    for path, wrong in [("model.safetensors", b"weightz"), ("sub/config.json", b"[]")]:
        blob = (cached / path).resolve()
        right = blob.read_bytes()
        blob.write_bytes(wrong)
        with pytest.raises(IntegrityError) as caught:
            fetched(cached)
        assert caught.value.exit_code == 3
        assert blob.name in caught.value.message
        blob.write_bytes(right)
    assert fetched(cached).digest


def test_a_link_in_the_hubs_cache_may_not_leave_the_repository(cached: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").touch()
    (cached / "link").symlink_to(other / "secret")
    with pytest.raises(IntegrityError, match="leaves the model"):
        listed(cached)


def test_a_file_that_grew_since_it_was_listed_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(bytes(1 << 20))
    source = sources.get("directory")()
    plan = source.plan(Reference("directory", str(tmp_path)), config=Config(), progress=Progress())
    with path.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(IntegrityError, match="changed while it was read"):
        source.fetch(plan, verify=True, config=Config(), progress=Progress())
