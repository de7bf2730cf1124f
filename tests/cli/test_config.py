"""weightctl config, as a user runs it."""

from __future__ import annotations

from pathlib import Path

from tests.command import weightctl


def test_each_value_and_where_it_came_from(tmp_path: Path, home: Path) -> None:
    (home / ".config" / "weightctl").mkdir(parents=True)
    user = home / ".config" / "weightctl" / "config.toml"
    user.write_text('workers = 3\nruns = 5\ndevice = "cpu"\n')
    (tmp_path / "weightctl.toml").write_text("workers = 4\nruns = 6\n")
    settings = weightctl("config", "--json", cwd=tmp_path, WEIGHTCTL_WORKERS="7").result
    assert (settings["workers"]["value"], settings["workers"]["origin"]) == (7, "WEIGHTCTL_WORKERS")
    assert (settings["runs"]["value"], settings["runs"]["origin"]) == (6, "weightctl.toml")
    assert (settings["device"]["value"], settings["device"]["origin"]) == ("cpu", str(user))
    assert (settings["timeout"]["value"], settings["timeout"]["origin"]) == (600, "default")
    table = weightctl("config", cwd=tmp_path, WEIGHTCTL_WORKERS="7", COLUMNS="200")
    assert table.stderr == ""
    (line,) = [line for line in table.stdout.splitlines() if line.startswith("workers")]
    assert line.split()[:3] == ["workers", "7", "WEIGHTCTL_WORKERS"]


def test_an_unknown_key_exits_2(tmp_path: Path, home: Path) -> None:
    (tmp_path / "weightctl.toml").write_text("wrokers = 4\n")
    done = weightctl("config", cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert "weightctl.toml: unknown key 'wrokers'" in done.stderr
    assert "hint: known keys: workers" in done.stderr


def test_a_bad_value_exits_2_and_says_what_is_allowed(tmp_path: Path) -> None:
    done = weightctl("config", cwd=tmp_path, WEIGHTCTL_DEVICE="tpu")
    assert (done.code, done.stdout) == (2, "")
    assert "WEIGHTCTL_DEVICE is 'tpu'" in done.stderr
    assert "hint: allowed: auto, cpu, cuda or cuda:N" in done.stderr
