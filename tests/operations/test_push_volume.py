"""Pushing a model to a volume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import start
from tests.disk import fork, lacking
from tests.hub_server import Fault, Hub
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError
from weightctl.operations.push_volume import PushResult, plan_push, push_volume
from weightctl.operations.resolve import resolve
from weightctl.progress import Progress


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


def push(model: object, volume: Path, **options: Any) -> PushResult:
    return push_volume(str(model), volume, **options, config=Config(workers=2), progress=Progress())


def test_a_real_model(minilm: Path, volume: Path) -> None:
    result = push(minilm, volume, name="sentence-transformers/all-MiniLM-L6-v2")
    assert result.path == volume / "sentence-transformers" / "all-MiniLM-L6-v2" / result.version
    assert models.contents(result.path) == models.contents(minilm)
    assert (result.files, result.verified, result.copied_bytes, result.reused_bytes) == (13, True, result.bytes, 0)
    again = push(minilm, volume, name="sentence-transformers/all-MiniLM-L6-v2")
    assert (again.version, again.copied_bytes, again.reused_bytes) == (result.version, 0, result.bytes)


def test_a_renamed_model_is_still_the_same_version(model: Path, volume: Path, tmp_path: Path) -> None:
    first = push(model, volume)
    before = models.state(first.path)
    second = push(model.rename(tmp_path / "renamed"), volume, name="m")
    assert (second.version, second.copied_bytes) == (first.version, 0)
    assert models.state(first.path) == before


def test_a_model_in_a_volume_is_a_model_for_other_commands(model: Path, volume: Path, tmp_path: Path) -> None:
    first = push(model, volume, name="org/m")
    models.flip_bit(model / "config.json")
    second = push(model, volume, name="org/m")

    def resolved(text: str) -> Any:
        return resolve(text, verify=True, config=Config(), progress=Progress())

    assert resolved(f"volume:{volume}#org/m").root == second.path
    assert resolved(f"volume:{volume}#org/m@{first.version}").root == first.path
    assert resolved(f"volume:{volume}#org/m").name == "org/m"
    (tmp_path / "other").mkdir()
    for model_there in (f"volume:{volume}#org/m@{first.version}", first.path):
        copied = push(model_there, tmp_path / "other")
        assert (copied.name, copied.version) == ("org/m", first.version)
    with pytest.raises(UsageError, match="is part of a volume, not a version of a model"):
        push(volume / "org", tmp_path / "other")


def test_a_plan_tells_what_a_push_then_does(model: Path, volume: Path) -> None:
    def plan() -> Any:
        return plan_push(str(model), volume, config=Config(), progress=Progress())

    models.settle(model)
    before = plan()
    assert (before.name, before.files, before.missing_bytes, before.exists) == ("m", 8, 0, False)
    assert list(volume.iterdir()) == []
    assert push(model, volume).copied_bytes == before.bytes
    assert plan().path == push(model, volume).path


def test_include_and_exclude(model: Path, volume: Path) -> None:
    result = push(model, volume, include=["*.safetensors", "config.json"], exclude=["*-00002-*"])
    assert set(models.contents(result.path)) == {"config.json", "model-00001-of-00002.safetensors"}
    assert push(model, volume).version != result.version


@pytest.mark.parametrize("name", ["latest", "..", "a/b/c", "/m", "org/latest"])
def test_what_is_no_name(model: Path, volume: Path, name: str) -> None:
    for run in (push_volume, plan_push):
        with pytest.raises(UsageError, match="not a model name") as caught:
            run(str(model), volume, name=name, config=Config(), progress=Progress())
        assert caught.value.hint
    assert list(volume.iterdir()) == []


def test_a_directory_whose_name_is_no_model_name_needs_one(model: Path, volume: Path) -> None:
    model = model.rename(model.with_name("my model"))
    with pytest.raises(UsageError, match="not a model name: 'my model'"):
        push(model, volume)
    assert push(model, volume, name="mine").files == 8


def test_a_missing_volume(model: Path, tmp_path: Path) -> None:
    for run in (push_volume, plan_push):
        with pytest.raises(UsageError, match="does not exist"):
            run(str(model), tmp_path / "nothing", config=Config(), progress=Progress())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_the_hubs_cache(volume: Path, tmp_path: Path, name: str) -> None:
    snapshot = models.write_hub_cache(tmp_path, {"config.json": b"{}", "model.safetensors": bytes(3 << 20)})
    models.flip_bit(snapshot / name)
    with pytest.raises(IntegrityError, match=(snapshot / name).resolve().name) as caught:
        push(snapshot, volume)
    assert caught.value.exit_code == 3
    assert not (volume / "org").exists()


def test_a_model_of_one_tensor_without_bytes(volume: Path, tmp_path: Path) -> None:
    models.write_safetensors(tmp_path / "m" / "model.safetensors", 0)
    (tmp_path / "m" / "empty").touch()
    assert models.contents(push(tmp_path / "m", volume).path) == models.contents(tmp_path / "m")


def test_an_empty_model(volume: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no files in"):
        push(tmp_path / "empty", volume)
    assert list(volume.iterdir()) == []


HUB_MODEL = {"config.json": b"{}", "sub/readme": b"some text", "model.safetensors": b"weights!" * (1 << 18)}


def test_no_cache_downloads_to_the_volume_alone(hub: Hub, volume: Path, home: Path) -> None:
    hub.add("org/name", HUB_MODEL)
    result = push("org/name", volume, no_cache=True)
    assert (result.name, result.copied_bytes, result.reused_bytes) == ("org/name", result.bytes, 0)
    assert models.contents(result.path) == HUB_MODEL
    assert models.bytes_in(home / "hf") < 1000
    assert list((volume / ".weightctl" / "staging").iterdir()) == []
    (volume / "other").mkdir()
    plain = push("org/name", volume / "other")
    assert (plain.version, models.contents(plain.path)) == (result.version, HUB_MODEL)


def test_no_cache_fetches_only_what_the_volume_lacks(hub: Hub, volume: Path) -> None:
    hub.add("org/name", HUB_MODEL)
    first = push("org/name", volume, no_cache=True)
    hub.requests.clear()
    again = push("org/name", volume, no_cache=True)
    assert (again.version, again.copied_bytes, hub.fetched()) == (first.version, 0, {})
    hub.add("org/name", {**HUB_MODEL, "config.json": b"[]"})
    hub.requests.clear()
    second = push("org/name", volume, no_cache=True)
    assert (second.copied_bytes, second.reused_bytes) == (2, second.bytes - 2)
    assert sum(hub.fetched().values()) == 2
    assert (first.path / "model.safetensors").samefile(second.path / "model.safetensors")
    assert models.contents(second.path) == {**HUB_MODEL, "config.json": b"[]"}


def test_no_cache_copies_inside_a_volume_that_has_no_links(hub: Hub, volume: Path) -> None:
    hub.add("org/name", HUB_MODEL)
    first = push("org/name", volume, no_cache=True)
    hub.add("org/name", {**HUB_MODEL, "config.json": b"[]"})
    hub.requests.clear()

    def push_without_links() -> None:
        lacking("link")
        second = push("org/name", volume, no_cache=True)
        assert second.copied_bytes + second.reused_bytes == second.bytes
        assert not (first.path / "model.safetensors").samefile(second.path / "model.safetensors")
        assert models.contents(second.path) == {**HUB_MODEL, "config.json": b"[]"}

    assert os.waitstatus_to_exitcode(os.waitpid(fork(push_without_links), 0)[1]) == 0
    assert sum(hub.fetched().values()) == 2
    assert list((volume / ".weightctl" / "staging").iterdir()) == []


def test_no_cache_goes_on_after_a_kill(hub: Hub, volume: Path, home: Path) -> None:
    """What the killed push had downloaded is not fetched again, and nothing of it was published."""
    large = {f"model-0000{shard}-of-00003.safetensors": os.urandom(6 << 20) for shard in (1, 2, 3)}
    hub.add("org/name", {**HUB_MODEL, **large})
    hub.faults["model-00003-of-00003.safetensors"] = Fault(stall_at=1 << 20, times=1)
    process = start("push-volume", "org/name", volume, "--no-cache", "--workers", 1)
    assert hub.stalled.wait(300)
    process.kill()
    process.communicate()
    assert not (volume / "org").exists()
    hub.requests.clear()
    result = push("org/name", volume, no_cache=True)
    assert models.contents(result.path) == {**HUB_MODEL, **large}
    assert sum(hub.fetched().values()) < result.bytes
    assert models.bytes_in(home / "hf") < 1000
    assert list((volume / ".weightctl" / "staging").iterdir()) == []


def test_no_cache_uses_what_the_cache_has(hub: Hub, volume: Path) -> None:
    hub.add("org/name", HUB_MODEL)
    resolve("org/name", verify=True, config=Config(), progress=Progress())
    hub.requests.clear()
    assert models.contents(push("org/name", volume, no_cache=True).path) == HUB_MODEL
    assert hub.fetched() == {}


def test_no_cache_takes_no_damaged_file_from_the_volume(hub: Hub, volume: Path) -> None:
    hub.add("org/name", HUB_MODEL)
    first = push("org/name", volume, no_cache=True)
    models.flip_bit(first.path / "model.safetensors")
    second = push("org/name", volume, no_cache=True)
    assert second.path == first.path
    assert models.contents(second.path) == HUB_MODEL
