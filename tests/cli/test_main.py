"""The application around the commands: exit codes, streams, help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import weightctl as package
from tests.command import COMMAND, weightctl

COMMANDS = ("pull", "bake", "push-volume", "serialize", "bench", "verify", "backends", "config")


def test_the_version() -> None:
    done = weightctl("--version")
    assert (done.code, done.stdout, done.stderr) == (0, f"weightctl {package.__version__}\n", "")


def test_every_command_of_the_contract_is_in_the_help() -> None:
    done = weightctl("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    for flag in ("--help", "-h"):
        done = weightctl(command, flag)
        assert (done.code, done.stderr) == (0, "")
        assert "--json" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "why", "where"),
    [
        (["bkae"], "no such command 'bkae'", "weightctl"),
        (["bake", "./m"], "missing option '--tag'", "weightctl bake"),
        (["bake", "--tga", "x"], "no such option: --tga", "weightctl bake"),
        (["bench", "m", "--nproc", "no"], "invalid value for '--nproc'", "weightctl bench"),
        (["pull", "--revision"], "option '--revision' requires an argument", "weightctl pull"),
        (["--verison"], "no such option: --verison", "weightctl"),
    ],
)
def test_a_command_line_that_cannot_be_read(arguments: list[str], why: str, where: str) -> None:
    done = weightctl(*arguments)
    assert (done.code, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: {why}")
    assert hint == f"hint: {where} --help"


def test_a_misspelt_variable_is_noted() -> None:
    done = weightctl("config", WEIGHTCTL_WROKERS="3")
    assert done.code == 0
    assert done.stderr == "note: WEIGHTCTL_WROKERS is not a setting and changes nothing: is WEIGHTCTL_WORKERS meant?\n"


def test_no_command_shows_the_help() -> None:
    done = weightctl()
    assert "push-volume" in done.stdout + done.stderr


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "evil\x1b[31m\u202e.json").symlink_to("/etc/passwd")
    done = weightctl("bake", tmp_path / "m", "--tag", "m:v1", "--to", f"layout:{tmp_path / 'layout'}")
    assert done.code == 3
    assert "\\x1b[31m\\u202e.json" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = [*COMMAND, "backends", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize("command", [["config"], ["config", "--json"], ["pull", "."], ["--help"], ["--version"]])
def test_an_answer_that_cannot_be_written_is_an_error(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
        )
    assert done.returncode == 1
    assert "error: cannot print the result: No space left on device\nhint: " in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_stream_may_be_closed(tmp_path: Path, stream: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = f"exec '{sys.executable}' -m weightctl pull . {stream}>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == ("" if stream == "1" else f"{tmp_path}\n")
    assert "Traceback" not in done.stderr


def test_a_terminal_without_unicode() -> None:
    done = weightctl("config", PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert "\\u2014" in done.stdout


def test_a_table_in_a_pipe_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "\n " not in weightctl("config").stdout


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's: a number without an entry in passwd."""
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME"):
        monkeypatch.delenv(variable)
    (tmp_path / "config.json").write_text("{}")
    code = "import pwd, runpy; pwd.getpwuid = {}.__getitem__; runpy.run_module('weightctl', run_name='__main__')"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["env", "-u", "HOME", sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("pull", ".")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}\n"), done.stderr
    for model in ("~/model", "volume:~/models#name", "org/name"):
        done = run("pull", model)
        assert done.returncode == 2, done.stderr
        assert "no home directory is known for '~/" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_interrupt_while_it_starts_is_no_traceback() -> None:
    code = """if True:
        import runpy, sys
        class Interrupting:
            def find_spec(self, name, *_):
                if name == "typer":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        runpy.run_module("weightctl", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_shell_completion() -> None:
    asked = {"_WEIGHTCTL_COMPLETE": "complete_bash", "COMP_WORDS": "weightctl pu", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("weightctl")
    done = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pull", "push-volume"]
