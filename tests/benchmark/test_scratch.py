"""Directories that are gone in the end, whoever was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightctl.benchmark.scratch import PREFIX, temporary


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}left" / "deep").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    elsewhere = tmp_path / "mine" / "file"
    elsewhere.touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere.parent)
    with temporary(tmp_path) as first, temporary(tmp_path) as second:
        (first / "file").touch()
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name, "mine", f"{PREFIX}link"}
    assert {path.name for path in tmp_path.iterdir()} == {"mine", f"{PREFIX}link"}
    assert elsewhere.exists()


def test_what_a_leftover_notes_is_undone_before_it_goes(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}left").mkdir()
    (tmp_path / f"{PREFIX}left" / "note").write_text("undo me")
    undone: list[str] = []
    with temporary(tmp_path, undo=lambda leftover: undone.append((leftover / "note").read_text())) as used:
        assert (undone, list(tmp_path.iterdir())) == (["undo me"], [used])


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), temporary(tmp_path, ".other-"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
