"""Flag, then variable, then file, then default; and nothing unknown passes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from weightctl.config import Config, config_files, misspelt_variables, resolve
from weightctl.errors import UsageError


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a home of our own, and no variables."""
    for setting in dataclasses.fields(Config):
        monkeypatch.delenv(f"WEIGHTCTL_{setting.name.upper()}", raising=False)
    (tmp_path / "here").mkdir()
    (tmp_path / "home" / "weightctl").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))


def write_here(text: str) -> Path:
    path = Path("weightctl.toml")
    path.write_text(text)
    return path


def write_home(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "home" / "weightctl" / "config.toml"
    path.write_text(text)
    return path


def test_flag_wins_over_variable_over_file_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve()["runs"] == (None, "default")
    at_home = write_home(tmp_path, "runs = 4\nworkers = 2")
    assert resolve()["runs"] == (4, str(at_home))
    here = write_here("runs = 5")
    assert resolve()["runs"] == (5, str(here))
    assert resolve()["workers"] == (2, str(at_home))
    monkeypatch.setenv("WEIGHTCTL_RUNS", "6")
    assert resolve()["runs"] == (6, "WEIGHTCTL_RUNS")
    assert resolve({"runs": 7})["runs"] == (7, "--runs")
    assert resolve({"runs": None})["runs"] == (6, "WEIGHTCTL_RUNS")
    assert Config.load({"runs": 7}).runs == 7


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCTL_RUNS", "")
    assert Config.load().runs is None


def test_misspelt_variables_and_those_that_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVICE_HOST", "SERVICE_PORT", "PORT", "PORT_80_TCP_ADDR", "MODEL_DIR", "", "WORKERS"):
        monkeypatch.setenv(f"WEIGHTCTL_{name}", "1")
    monkeypatch.setenv("OTHER_WEIGHTCTL_WORKER", "1")
    assert misspelt_variables() == {}
    monkeypatch.setenv("WEIGHTCTL_WORKER", "1")
    monkeypatch.setenv("WEIGHTCTL_TENSORISER_READERS", "1")
    assert misspelt_variables() == {
        "WEIGHTCTL_TENSORISER_READERS": "WEIGHTCTL_TENSORIZER_READERS", "WEIGHTCTL_WORKER": "WEIGHTCTL_WORKERS",
    }  # fmt: skip


def test_a_directory_of_files_that_are_not_there() -> None:
    assert config_files() == []


def test_every_default_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in dataclasses.fields(Config):
        assert setting.metadata["allowed"]
        assert setting.metadata["meaning"]
        if (default := getattr(Config(), setting.name)) is not None:
            assert setting.metadata["parse"](default) == default
            monkeypatch.setenv(f"WEIGHTCTL_{setting.name.upper()}", str(default))
    assert Config.load() == Config()


def test_a_path_begins_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Config.load({"cache_dir": "~/models"}).cache_dir == Path("/home/somebody/models")


def test_an_unknown_key_names_file_key_and_known_ones() -> None:
    write_here("wrokers = 4")
    with pytest.raises(UsageError) as caught:
        Config.load()
    assert caught.value.exit_code == 2
    assert "weightctl.toml" in caught.value.message
    assert "'wrokers'" in caught.value.message
    assert caught.value.hint
    assert "workers" in caught.value.hint


BAD = [
    ("workers", "0"), ("workers", "257"), ("workers", "many"), ("workers", "1.5"), ("runs", "-1"), ("runs", "0x10"),
    ("timeout", "86401"), ("device", "gpu"), ("device", "cuda:"), ("device", "cuda:x"), ("device", "cuda:0\n"),
    ("strategy", "Fast"), ("strategy", "../x"), ("workers", "9" * 5000),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_bad_variable_names_itself_and_what_is_allowed(key: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"WEIGHTCTL_{key.upper()}", value)
    with pytest.raises(UsageError, match=f"WEIGHTCTL_{key.upper()} is") as caught:
        Config.load()
    assert "allowed: " in str(caught.value.hint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("workers", "true"), ("workers", "2.0"), ("workers", "[1]"), ("runs", '"many"'), ("cache_dir", "3"),
     ("cache_dir", '""'), ("device", "0"), ("timeout", "1979-05-27"), ("strategy", "{}")],
)  # fmt: skip
def test_a_bad_value_in_a_file_names_file_key_and_what_is_allowed(key: str, value: str) -> None:
    write_here(f"{key} = {value}")
    with pytest.raises(UsageError, match=f"weightctl.toml: {key} is") as caught:
        Config.load()
    assert caught.value.exit_code == 2
    assert "allowed: " in str(caught.value.hint)


def test_a_bad_flag_is_called_by_its_name() -> None:
    with pytest.raises(UsageError, match="--cache-dir is ''"):
        Config.load({"cache_dir": ""})


@pytest.mark.parametrize("content", [b"workers = ", b"= 3", b"\xff\xfe", b"workers = 1\nworkers = 2", b"\0",
                                     b"workers = " + b"9" * 5000, b"workers = " + b"[" * 100_000])  # fmt: skip
def test_a_file_that_is_no_toml_is_named(content: bytes) -> None:
    Path("weightctl.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"weightctl\.toml is not valid TOML"):
        Config.load()


def test_a_bad_value_at_home_is_found_though_another_file_wins(tmp_path: Path) -> None:
    write_home(tmp_path, "unknown = 1")
    write_here("runs = 5")
    with pytest.raises(UsageError, match="unknown key"):
        Config.load()


def test_the_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().runs = 4  # type: ignore[misc]
