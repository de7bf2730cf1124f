"""weightctl push-volume, as a user runs it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import models
from tests.command import start, start_halting, weightctl

READ = "weightctl.volumes.copying._read"
"""Called for each block of 2 MiB."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


def test_stdout_holds_only_the_path(model: Path, volume: Path) -> None:
    done = weightctl("push-volume", model, volume)
    assert done.code == 0
    path = Path(done.stdout.rstrip("\n"))
    assert path == volume / "m" / os.readlink(volume / "m" / "latest")
    assert models.contents(path) == models.contents(model)
    assert "8 files, 3.0 MB, 3.0 MB copied and verified" in done.stderr
    assert "nothing to copy" in weightctl("push-volume", model, volume).stderr


def test_json_is_the_contract(model: Path, volume: Path) -> None:
    result = weightctl("push-volume", model, volume, "--name", "org/m", "--json").result
    assert list(result) == [
        "volume", "name", "version", "path", "files", "bytes", "copied_bytes", "reused_bytes", "verified", "seconds",
    ]  # fmt: skip
    assert result["path"] == str(volume / "org" / "m" / result["version"])
    again = weightctl("push-volume", model, volume, "--name", "org/m", "--json").result
    assert (again["version"], again["copied_bytes"], again["reused_bytes"]) == (result["version"], 0, result["bytes"])


def test_a_dry_run_touches_nothing(model: Path, volume: Path) -> None:
    done = weightctl("push-volume", model, volume, "--dry-run")
    assert (done.code, done.stdout) == (0, f"{volume / 'm'}\n")
    plan = weightctl("push-volume", model, volume, "--dry-run", "--json").result
    assert (plan["files"], plan["exists"]) == (8, False)
    assert list(volume.iterdir()) == []


def test_a_pushed_model_can_be_baked(model: Path, volume: Path, tmp_path: Path) -> None:
    assert weightctl("push-volume", model, volume).code == 0
    layouts = [f"layout:{tmp_path / name}" for name in ("one", "two")]
    digests = [
        weightctl("bake", source, "--tag", "m:v1", "--to", layout).stdout
        for source, layout in zip((model, f"volume:{volume}#m"), layouts, strict=True)
    ]
    assert digests[0].startswith("sha256:")
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "latest"], ["not a model name: 'latest'", "hint: "]),
        (["--name", ".."], ["not a model name", "hint: "]),
        (["--name", "a/b/c"], ["not a model name", "hint: "]),
        (["--workers", "many"], ["workers"]),
        (["--include", "nothing*"], ["no files in", "hint: "]),
    ],
)
def test_what_is_wrong_is_said(model: Path, volume: Path, arguments: list[str], words: list[str]) -> None:
    done = weightctl("push-volume", model, volume, *arguments)
    assert (done.code, done.stdout) == (2, "")
    for word in words:
        assert word in done.stderr
    assert list(volume.iterdir()) == []


def test_a_missing_volume(model: Path, tmp_path: Path) -> None:
    done = weightctl("push-volume", model, tmp_path / "nothing")
    assert (done.code, done.stdout) == (2, "")
    assert "does not exist" in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_damage_exits_3(model: Path, volume: Path, tmp_path: Path) -> None:
    snapshot = models.write_hub_cache(tmp_path / "hub", models.contents(model))
    blob = (snapshot / "model-00001-of-00002.safetensors").resolve()
    models.flip_bit(blob)
    done = weightctl("push-volume", snapshot, volume)
    assert (done.code, done.stdout) == (3, "")
    assert blob.name in done.stderr
    assert os.listdir(volume) == [".weightctl"]


def test_an_interrupt_stops_in_the_middle_of_a_file(volume: Path, tmp_path: Path) -> None:
    model = models.write_sparse_model(tmp_path / "m", 4 << 30)
    process = start_halting(signal.SIGINT, READ, 10, "push-volume", model, volume)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert os.listdir(volume) == [".weightctl"]


def test_keep_removes_old_versions(model: Path, volume: Path) -> None:
    first = weightctl("push-volume", model, volume, "--json").result
    models.flip_bit(model / "config.json")
    done = weightctl("push-volume", model, volume, "--keep", 1)
    assert done.code == 0
    assert f"removed m@{first['version']}" in done.stderr
    assert sorted(os.listdir(volume / "m")) == sorted([Path(done.stdout.strip()).name, "latest"])
    assert weightctl("push-volume", model, volume, "--keep", 0).code == 2


def test_a_second_push_says_that_it_waits(volume: Path, tmp_path: Path) -> None:
    model = models.write_sparse_model(tmp_path / "m", 16 << 20)
    first = start_halting(signal.SIGSTOP, READ, 5, "push-volume", model, volume)
    second = start("push-volume", model, volume)
    assert second.stderr
    assert "another process is pushing the same" in second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    stdout, stderr = second.communicate()
    assert first.communicate()[0] == stdout
    assert "nothing to copy" in stderr


def test_a_home_directory_in_a_volumes_name(model: Path, home: Path) -> None:
    (home / "volume").mkdir()
    assert weightctl("push-volume", model, home / "volume").code == 0
    assert weightctl("verify", "volume:~/volume#m").code == 0


def test_no_cache_is_for_models_of_the_hub(model: Path, volume: Path) -> None:
    assert weightctl("push-volume", model, volume, "--no-cache").code == 0
