"""weightctl prune and weightctl volumes, as a user runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import models
from tests.command import weightctl
from weightctl import Volume
from weightctl.config import Config
from weightctl.operations.push_volume import push_volume
from weightctl.progress import Progress


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def versions(volume: Path, tmp_path: Path) -> list[str]:
    """Three versions of one model, the last one being the latest."""
    model = models.write_model(tmp_path / "m")
    pushed = []
    for text in "123":
        (model / "config.json").write_text(text)
        done = push_volume(str(model), volume, config=Config(), progress=Progress())
        pushed.append(done.version)
    return pushed


def test_volumes_lists_what_is_there(volume: Path, versions: list[str]) -> None:
    with Volume(volume).use("m", versions[0]):
        done = weightctl("volumes", volume, "--json")
        rows = weightctl("volumes", volume, COLUMNS="40").stdout.splitlines()
    assert [row["version"] for row in done.result["versions"]] == versions[::-1]
    assert [row["latest"] for row in done.result["versions"]] == [True, False, False]
    assert [row["readers"] for row in done.result["versions"]] == [[], [], [f"{os.uname().nodename}:{os.getpid()}"]]
    assert {(row["name"], row["files"], row["bytes"]) for row in done.result["versions"]} == {("m", 8, 3_000_247)}
    assert done.result["bytes"] == 3 * 3_000_247
    assert rows[0] == "m"
    assert [row.split()[0] for row in rows[1:]] == versions[::-1]  # no row is folded
    assert ["latest" in row for row in rows] == [False, True, False, False]
    assert rows[3].endswith(f"read by {os.uname().nodename}:{os.getpid()}")


def test_an_empty_volume(volume: Path) -> None:
    assert weightctl("volumes", volume, "--json").result == {"volume": str(volume), "versions": [], "bytes": 0}
    for command in (["volumes", volume], ["prune", volume, "--keep", 1]):
        done = weightctl(*command)
        assert (done.code, done.stdout) == (0, "")
    assert "done: 0 versions, 0 B freed" in done.stderr


def test_prune(volume: Path, versions: list[str]) -> None:
    plan = weightctl("prune", volume, "--keep", 2, "--dry-run")
    assert (plan.code, plan.stdout) == (0, f"{volume / 'm' / versions[0]}\n")
    assert weightctl("prune", volume, "--keep", 1, "--older-than", "1h").stdout == ""
    assert sorted(os.listdir(volume / "m")) == sorted([*versions, "latest"])
    with Volume(volume).use("m", versions[1]):
        result = weightctl("prune", volume, "--older-than", "0s", "--json").result
    assert [version["version"] for version in result["removed"]] == [versions[0]]
    assert [version["version"] for version in result["in_use"]] == [versions[1]]
    assert result["freed_bytes"] == 1
    assert sorted(os.listdir(volume / "m")) == sorted([*versions[1:], "latest"])
    assert list(json.loads(weightctl("prune", volume, "--json").stdout)) == [
        "volume", "removed", "in_use", "leftovers", "freed_bytes", "dry_run", "seconds",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--older-than", "soon"], "not a duration"),
        (["--older-than", "-1d"], "not a duration"),
        (["--keep", 0], "keep"),
    ],
)
def test_what_is_wrong_is_said(volume: Path, arguments: list[object], word: str) -> None:
    done = weightctl("prune", volume, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert word in done.stderr


@pytest.mark.parametrize("command", ["prune", "volumes"])
def test_a_missing_volume(tmp_path: Path, command: str) -> None:
    done = weightctl(command, tmp_path / "nothing")
    assert (done.code, done.stdout) == (2, "")
    assert "does not exist" in done.stderr
