"""MODEL taken apart, paths that must not leave the model, and the snapshot."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightctl.errors import IntegrityError, UsageError
from weightctl.model import WEIGHT_BYTES, File, Reference, Snapshot, check_name, check_path, matches

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", Reference("huggingface", "gpt2")),
        ("org/name", Reference("huggingface", "org/name")),
        ("org/name@v1.0", Reference("huggingface", "org/name", None, "v1.0")),
        (f"org/name@{COMMIT}", Reference("huggingface", "org/name", None, COMMIT)),
        ("org/name@refs/pr/1", Reference("huggingface", "org/name", None, "refs/pr/1")),
        ("hf://org/name@main", Reference("huggingface", "org/name", None, "main")),
        ("/models/llama", Reference("directory", "/models/llama")),
        ("./llama", Reference("directory", "llama")),
        ("../llama", Reference("directory", "../llama")),
        (".", Reference("directory", ".")),
        ("..", Reference("directory", "..")),
        ("file:///models/my%20llama", Reference("directory", "/models/my llama")),
        ("/models/a@b", Reference("directory", "/models/a@b")),
        ("volume:/vol#llama", Reference("volume", "/vol", "llama")),
        ("volume:vol#org/llama@3", Reference("volume", "vol", "org/llama", "3")),
    ],
)
def test_reference(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected


def test_home_is_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Reference.parse("~/llama") == Reference("directory", "/home/somebody/llama")


@pytest.mark.parametrize(
    "text",
    ["", "@main", "org/", "/".join("abc"), "org//name", "-x", "https://example.com/x", "file://host/x", "file://x",
     "volume:", "volume:/vol", "volume:#x", "volume:/vol#", "volume:/vol#../x", "volume:/vol#latest",
     "volume:/vol#a/latest", "a\0b", "/a\0b", "org/na me", "org/name\n", "hf://", "hf:///x", "org/../x",
     "~nobody-of-that-name/x"],
)  # fmt: skip
def test_what_is_no_model(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reference.parse(text)
    assert caught.value.exit_code == 2


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        Reference.parse(text)


def test_a_directory_wins_only_when_written_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert Reference.parse("org/name").source == "huggingface"
    Path("my model").mkdir()
    with pytest.raises(UsageError) as caught:
        Reference.parse("my model")
    assert caught.value.hint == "a directory is written as a path: ./my model"


def test_the_revision_flag() -> None:
    assert Reference.parse("org/name", "v2").revision == "v2"
    assert Reference.parse("org/name@v2", "v2").revision == "v2"
    assert Reference.parse("volume:/vol#name", "2").revision == "2"
    with pytest.raises(UsageError, match="two revisions"):
        Reference.parse("org/name@v1", "v2")
    with pytest.raises(UsageError, match="no revisions"):
        Reference.parse("./dir", "v2")


@pytest.mark.parametrize("text", ["org/name@v1", "org/name", "volume:/vol#org/name@3", "volume:/vol#name", "/models/x"])
def test_a_reference_prints_as_it_is_written(text: str) -> None:
    assert str(Reference.parse(text)) == text


@pytest.mark.parametrize("name", ["llama", "org/llama-3.1_8B", "9x"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b/c", "latest", "org/latest", "latest/x", "a b", "a\n", "ü/"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.parametrize(
    "path", ["config.json", "a/b/c", "with space", "ünïcode/☃", "..a", "a..", "...", ".hidden", "a\\b"]
)
def test_paths_that_stay_inside(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize(
    "path", ["", "/", "/etc/passwd", "..", "../x", "a/../x", "a/..", ".", "./a", "a/./b", "a//b", "a/", "a\0b"]
)
def test_paths_that_leave(path: str) -> None:
    with pytest.raises(IntegrityError, match="leads outside of it or nowhere"):
        check_path(path)


@given(st.lists(st.sampled_from(["a", "..", ".", "", "b c", "\0"]), max_size=6).map("/".join))
def test_a_path_that_passes_lies_below_any_root(path: str) -> None:
    root = Path("/some/root")
    try:
        inside = root / check_path(path)
    except IntegrityError:
        return
    assert root in inside.parents
    assert ".." not in inside.parts


def file(path: str, size: int = 1, sha256: str | None = "0" * 64) -> File:
    return File(path, size, Path("/m") / path, sha256)


def test_a_snapshot_is_ordered_and_sums_up() -> None:
    snapshot = Snapshot("m", Path("/m"), (file("b", 2), file("a/z", 3), file("a", 5)))
    assert [f.path for f in snapshot.files] == ["a", "a/z", "b"]
    assert snapshot.bytes == 10
    assert snapshot.file("b") == file("b", 2)
    assert snapshot.file("c") is None


def test_a_snapshot_refuses_paths_that_leave_and_doubles() -> None:
    with pytest.raises(IntegrityError, match="leads outside"):
        Snapshot("m", Path("/m"), (file("../evil"),))
    with pytest.raises(IntegrityError, match="'a' twice"):
        Snapshot("m", Path("/m"), (file("a"), file("b"), file("a")))


def test_equal_models_have_equal_digests_wherever_they_lie() -> None:
    here = Snapshot("here", Path("/m"), (file("a"), file("b")))
    there = Snapshot("there", Path("/n"), (file("b"), dataclasses.replace(file("a"), source=Path("/n/a"))), "org/name")
    assert here.digest == there.digest
    others = [(file("a"),), (file("a"), file("c")), (file("a"), file("b", 2)), (file("a"), file("b", 1, "1" * 64))]
    assert len({here.digest, *(Snapshot("m", Path("/m"), files).digest for files in others)}) == 5


def test_a_path_cannot_imitate_a_list_of_files() -> None:
    joined = Snapshot("m", Path("/m"), (file('a", 1, "x"]\n["b'),))
    assert joined.digest != Snapshot("m", Path("/m"), (file("a"), file("b"))).digest


def test_a_snapshot_without_hashes_has_no_digest() -> None:
    with pytest.raises(ValueError, match="hashed"):
        _ = Snapshot("m", Path("/m"), (file("a", 1, None),)).digest


def test_files_are_replaced_in_a_new_snapshot() -> None:
    snapshot = Snapshot("m", Path("/m"), (file("a", 1, None),), "org/name", "main", COMMIT)
    hashed = snapshot.replace_files([file("a")])
    assert hashed.digest
    assert (hashed.repo_id, hashed.commit) == ("org/name", COMMIT)
    assert snapshot.files[0].sha256 is None


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [("m.safetensors", WEIGHT_BYTES, True), ("m.safetensors", WEIGHT_BYTES - 1, False), ("M.BIN", WEIGHT_BYTES, True),
     ("tokenizer.json", 16 * WEIGHT_BYTES - 1, False), ("tokenizer.json", 16 * WEIGHT_BYTES, True)],
)  # fmt: skip
def test_what_counts_as_weights(path: str, size: int, expected: bool) -> None:
    assert file(path, size).is_weight is expected


@pytest.mark.parametrize("path", ["a.json", "a/b.json", "a/c/d.bin", "B.JSON", "[x].json"])
@pytest.mark.parametrize("include", [(), ("*.json",), ("a/",), ("a/*",), ("[[]x].json",), ("*.json", "*.bin")])
@pytest.mark.parametrize("exclude", [(), ("a/c/*",), ("*.bin",), ("*",)])
def test_patterns_mean_what_they_mean_to_the_hub_library(
    path: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    theirs = filter_repo_objects([path], allow_patterns=list(include) or None, ignore_patterns=list(exclude) or None)
    assert matches(path, include, exclude) is bool(list(theirs))
