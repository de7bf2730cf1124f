"""weightctl verify, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import models
from tests.command import weightctl


@pytest.fixture
def pushed(tmp_path: Path) -> Path:
    """The path of a version in a volume."""
    (tmp_path / "volume").mkdir()
    model = models.write_model(tmp_path / "m")
    return Path(weightctl("push-volume", model, tmp_path / "volume").stdout.strip())


def test_what_is_whole_exits_0(pushed: Path, tmp_path: Path) -> None:
    target = f"volume:{tmp_path / 'volume'}#m"
    done = weightctl("verify", target)
    assert (done.code, done.stdout) == (0, f"{target}\n")
    assert "8 files, 3.0 MB, verified" in done.stderr
    result = weightctl("verify", target, "--json").result
    assert list(result) == ["target", "files", "bytes", "verified", "problems", "seconds"]
    assert (result["verified"], result["problems"]) == (True, [])


def test_a_plain_directory_says_that_there_is_little_to_compare(tmp_path: Path) -> None:
    done = weightctl("verify", models.write_model(tmp_path / "m"))
    assert done.code == 0
    assert "note: nothing says what 8 of 8 files should hold" in done.stderr


def test_what_is_harmed_exits_3_and_is_named_also_as_json(pushed: Path, tmp_path: Path) -> None:
    models.flip_bit(pushed / "model-00002-of-00002.safetensors")
    (pushed / "config.json").unlink()
    target = f"volume:{tmp_path / 'volume'}#m@{pushed.name}"
    done = weightctl("verify", target)
    assert (done.code, done.stdout) == (3, "")
    cut, damaged = done.stderr.splitlines()[1:3]
    assert f"error: {target} has 2 problems:\n" in done.stderr
    assert "config.json cannot be read" in cut
    assert "model-00002-of-00002.safetensors is damaged" in damaged
    assert "hint: " in done.stderr
    told = weightctl("verify", target, "--json")
    assert told.code == 3
    assert told.result["verified"] is False
    assert len(told.result["problems"]) == 2


def test_of_very_many_problems_the_first_are_told(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "m").mkdir()
    for number in range(25):
        (tmp_path / "m" / f"{number:02}.json").write_text("{}")
    version = Path(weightctl("push-volume", tmp_path / "m", tmp_path / "volume").stdout.strip())
    for file in version.iterdir():
        file.unlink()
    told = weightctl("verify", f"volume:{tmp_path / 'volume'}#m").stderr
    assert told.count("cannot be read") == 20
    assert "and 5 more: --json lists them\nhint: " in told


def test_a_directory_that_is_called_as_a_kind_of_image_is(tmp_path: Path) -> None:
    models.write_model(tmp_path / "m")
    weightctl("bake", "./m", "--tag", "m:v1", "--to", "layout:layout", cwd=tmp_path)
    assert weightctl("verify", "layout", cwd=tmp_path).code == 0


def test_nothing_to_verify_exits_2(tmp_path: Path) -> None:
    for target in (tmp_path / "nothing", f"volume:{tmp_path}#m", "layout:."):
        done = weightctl("verify", target, "--json", cwd=tmp_path)
        assert (done.code, done.stdout) == (2, "")
        assert "error: " in done.stderr
