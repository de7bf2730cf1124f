"""weightctl bake, as a user runs it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import models
from tests.command import start_halting, weightctl
from tests.images.conformance import read_layout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


def test_stdout_holds_only_the_digest(model: Path, tmp_path: Path) -> None:
    done = weightctl("bake", model, "--tag", "m:v1", "--to", f"layout:{tmp_path / 'layout'}")
    assert done.code == 0
    assert done.stdout == f"{read_layout(tmp_path / 'layout', 'v1').digest}\n"
    assert "3 layers (0 reused), 3.1 MB" in done.stderr


def test_json_is_the_contract(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    done = weightctl("bake", model, "--tag", "m:v1", "--to", f"layout:{layout}", "--json")
    result = done.result
    assert list(result) == ["tag", "target", "digest", "layers", "bytes", "written_bytes", "seconds"]
    assert all(list(row) == ["digest", "size", "media_type", "files", "reused"] for row in result["layers"])
    image = read_layout(layout, "v1")
    assert result["digest"] == image.digest
    assert [row["digest"] for row in result["layers"]] == [layer["digest"] for layer in image.manifest["layers"]]
    again = weightctl("bake", model, "--tag", "m:v1", "--to", f"layout:{layout}", "--json").result
    assert (again["digest"], again["written_bytes"]) == (result["digest"], 0)


def test_a_dry_run_touches_nothing(model: Path, tmp_path: Path) -> None:
    arguments = ("bake", model, "--tag", "m", "--to", f"layout:{tmp_path / 'layout'}", "--dry-run")
    done = weightctl(*arguments)
    assert (done.code, done.stdout) == (0, "m:latest\n")
    plan = weightctl(*arguments, "--json").result
    assert (plan["tag"], plan["missing_bytes"]) == ("m:latest", 0)
    assert not (tmp_path / "layout").exists()


def test_every_option_arrives(model: Path, tmp_path: Path) -> None:
    done = weightctl(
        "bake", model, "--tag", "org/m:v2", "--to", f"layout:{tmp_path / 'layout'}", "--base", "scratch",
        "--path", "/weights", "--platform", "linux/arm64/v8", "--created", "2026-01-31T12:00:00Z",
        "--include", "*.safetensors", "--include", "*.json", "--exclude", "1_*", "--workers", 1,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    image = read_layout(tmp_path / "layout", "v2")
    assert sorted(image.files) == [
        "/weights/config.json",
        "/weights/model-00001-of-00002.safetensors",
        "/weights/model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert [image.config[key] for key in ("os", "architecture", "variant", "created")] == [
        "linux", "arm64", "v8", "2026-01-31T12:00:00Z",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "nowhere:x"], 2, ["unknown image target 'nowhere'", "known: ", "layout"]),
        (["--to", "layout:"], 2, ["needs a directory"]),
        (["--to", "layout:."], 2, ["is no OCI layout"]),
        (["--tag", "Not A Tag"], 2, ["not an image name"]),
        (["--path", "relative"], 2, ["not a directory for the model"]),
        (["--platform", "x"], 2, ["not a platform"]),
        (["--created", "x"], 2, ["not an RFC 3339 time"]),
        (["--workers", "0"], 2, ["--workers", "allowed: a whole number"]),
        (["--include", "nothing*"], 2, ["no files in"]),
        (["--revision", "v1"], 2, ["a directory has no revisions"]),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    model: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    fixed = ["bake", str(model), "--tag", "m:v1", "--to", f"layout:{tmp_path / 'layout'}"]
    done = weightctl(*fixed, *arguments, cwd=tmp_path)
    assert (done.code, done.stdout) == (code, "")
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "layout").exists()


def test_damage_exits_3(model: Path, tmp_path: Path) -> None:
    snapshot = models.write_hub_cache(tmp_path / "hub", models.contents(model))
    blob = (snapshot / "model-00001-of-00002.safetensors").resolve()
    models.flip_bit(blob)
    done = weightctl("bake", snapshot, "--tag", "m:v1", "--to", f"layout:{tmp_path / 'layout'}")
    assert (done.code, done.stdout) == (3, "")
    assert blob.name in done.stderr
    assert "hint: pull the model again" in done.stderr


def test_a_damaged_index_exits_3(model: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    assert weightctl("bake", model, "--tag", "m:v1", "--to", f"layout:{layout}").code == 0
    (layout / "index.json").write_text("{")
    done = weightctl("bake", model, "--tag", "m:v2", "--to", f"layout:{layout}")
    assert (done.code, done.stdout) == (3, "")
    assert "index.json is damaged" in done.stderr


def test_an_interrupt_stops_in_the_middle_of_a_file(tmp_path: Path) -> None:
    model, layout = tmp_path / "m", tmp_path / "layout"
    model.mkdir()
    with (model / "model.safetensors").open("wb") as stream:
        stream.truncate(4 << 30)  # sparse: it would go on for seconds
    command = ("bake", model, "--tag", "m:v1", "--to", f"layout:{layout}")
    process = start_halting(signal.SIGINT, "weightctl.storage._read_full", 5, *command)  # reads 4 MiB each time
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(layout.rglob("*.weightctl-tmp")) == []
    assert not (layout / "index.json").exists()
    assert list((layout / "blobs" / "sha256").iterdir()) == []


def test_json_of_names_that_are_not_ascii(model: Path, tmp_path: Path) -> None:
    done = weightctl("bake", model, "--tag", "m", "--to", f"layout:{tmp_path / 'läyout'}", "--json", LC_ALL="C")
    files = [name for row in json.loads(done.stdout)["layers"] for name in row["files"]]
    assert sorted(files) == sorted(models.contents(model))
