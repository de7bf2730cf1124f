"""Whole cold starts with real engines and a real registry, and nothing of them left."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import models
from tests.command import start, start_halting, weightctl
from tests.services import docker_engine, docker_registry, tool
from weightctl.benchmark.engines import engines
from weightctl.benchmark.engines.commands import run_command
from weightctl.benchmark.results import BenchResult, Scenario, read_result
from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError
from weightctl.operations.scenario import Shipping, run_scenarios
from weightctl.progress import Progress


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with docker_engine() as host:
        yield host


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where everything temporary goes; podman takes no long paths."""
    with tempfile.TemporaryDirectory(prefix="s-") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)
        assert list(Path(directory).glob("*weightctl*")) == []


def run(model: Path, *scenarios: str, runs: int | None = 1, **options: object) -> BenchResult:
    shipping = Shipping(scenarios, **options)  # type: ignore[arg-type]
    return run_scenarios(str(model), shipping, config=Config(runs=runs, device="cpu"), progress=Progress())


def small_model(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.rand(4 << 20), "b": torch.rand(3)}, directory / "model.safetensors")
    return directory


def stages(row: Scenario) -> list[str]:
    return [stage.name for stage in row.stages]


def processes_with(variable: str) -> list[str]:
    """Those of whose environment it is a part."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


def command_lines() -> list[list[str]]:
    """Of every process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace").split("\0")[:-1])
    return found


def test_a_real_model_as_a_user_does_it(
    minilm: Path, tmp_path: Path, temporary: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine)
    socket = Path(engine.removeprefix("unix://")).parent / "exec" / "containerd" / "containerd.sock"
    monkeypatch.setenv("CONTAINERD_ADDRESS", str(socket))
    scenarios = ["--scenario", "image", "--scenario", "volume", "--scenario", "file", "--scenario", "model"]
    with docker_registry(tmp_path) as host:
        outcome = weightctl(
            "bench", minilm, *scenarios, "--registry", f"{host}/m", "--jobs", 2, "--runs", 1, "--device", "cpu",
            "--output", tmp_path / "result.json", COLUMNS="80",
        )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert max(map(len, outcome.stdout.splitlines())) <= 80
    result = read_result(tmp_path / "result.json")
    assert result.complete
    rows = {(row.scenario, row.way): row for row in result.scenarios}
    assert list(rows) == [
        *(("image", name) for name in engines.names()), ("volume", "in place"), ("volume", "copied"),
        ("file", "in place"), ("model", "in place"),
    ]  # fmt: skip
    for row in rows.values():
        if "it was not cold" in str(row.reason):  # what to drop from its cache is for the kernel to say
            continue
        assert row.status == "ok", row
        assert row.median_seconds == pytest.approx(sum(stage.seconds for stage in row.stages))
        assert stages(row)[-2:] == ["start", "load"]
        assert row.stages[-1].bytes > 90_000_000
    assert stages(rows["image", "docker"]) == ["pull", "unpack", "start", "load"]
    assert stages(rows["volume", "copied"]) == ["copy", "start", "load"]
    jobs = {"docker": None, "containerd": 2, "podman": 2, "umoci": None}
    assert {name: rows["image", name].jobs for name in engines.names()} == jobs
    assert "bench-" not in tool("docker", "images")
    assert tool("ctr", "images", "list", "--quiet") == ""
    assert "stays in the registry" in outcome.stderr  # which is told not to delete


def test_from_a_layout_only_some_engines_pull(tmp_path: Path) -> None:
    if reason := engines.get("umoci").unavailable():
        pytest.skip(reason)
    rows = {row.way: row for row in run(models.settle(small_model(tmp_path)), "image").scenarios}
    assert (rows["umoci"].status, stages(rows["umoci"])) == ("ok", ["pull", "unpack", "start", "load"])
    for name in ("docker", "containerd"):
        assert rows[name].status == "unavailable"
        assert rows[name].reason


def test_a_registry_that_is_not_there_is_a_row(tmp_path: Path) -> None:
    if reason := engines.get("umoci").unavailable():
        pytest.skip(reason)
    (row,) = run(small_model(tmp_path), "image", registry="127.0.0.1:9/m", engines=("umoci",)).scenarios
    assert row.status == "failed"
    assert "127.0.0.1:9" in str(row.reason)


def test_files_that_stay_in_memory_have_no_cold_start_and_no_cold_ceiling(tmp_path: Path) -> None:
    path = small_model(tmp_path) / "model.safetensors"
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as held:
        assert sum(held[:: mmap.PAGESIZE]) > 0  # what a process has mapped cannot be dropped
        result = run(tmp_path, "model")
    assert result.ceilings.keys() == {"warm_read"}
    (found,) = result.scenarios
    assert (found.status, found.reason) == ("failed", "it was not cold: 100 % of the files was cached")


@pytest.mark.usefixtures("disk")
def test_a_volume_and_a_scratch_of_the_users_are_left_as_they_were(tmp_path: Path) -> None:
    model, volume, scratch = small_model(tmp_path / "m"), tmp_path / "v", tmp_path / "s"
    for directory in (volume, scratch):
        directory.mkdir()
        (directory / "mine").write_text("here")
    before = models.state(volume), models.state(scratch)
    assert {row.status for row in run(model, "volume", volume=volume, scratch=scratch).scenarios} == {"ok"}
    assert (models.state(volume), models.state(scratch)) == before


def test_a_killed_bench_leaves_no_process_and_the_next_one_nothing_at_all(
    tmp_path: Path, temporary: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine)
    model = small_model(tmp_path / "model")
    with docker_registry(tmp_path) as host:
        start_halting(
            signal.SIGKILL, "weightctl.operations.scenario.run_load", 1,
            "bench", model, "--scenario", "image", "--engine", "docker", "--registry", f"{host}/m", "--device", "cpu",
            MARK=str(temporary),
        )  # fmt: skip
        models.wait_for(lambda: not processes_with(f"MARK={temporary}"))
        assert "bench-" in tool("docker", "images")
        assert len(list(temporary.iterdir())) == 1
        result = run(model, "image", engines=("docker",), runs=None)
    assert (result.settings.runs, [row.status for row in result.scenarios]) == (3, ["unavailable"])  # no registry given
    assert "bench-" not in tool("docker", "images")
    assert list(temporary.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    process = start(
        "bench", small_model(tmp_path), "--scenario", "volume", "--runs", 50, "--device", "cpu", TMPDIR=str(temporary)
    )
    models.wait_for(lambda: list(temporary.glob("weightctl-start-*/tmp*")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert list(temporary.iterdir()) == []


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    with pytest.raises(UsageError, match="unknown scenario 'cloud'"):
        run(model, "cloud")
    with pytest.raises(UsageError, match="unknown engine 'lorry'"):
        run(model, "image", engines=("lorry",))
    with pytest.raises(UsageError, match="does not exist"):
        run(model, "volume", volume=tmp_path / "none")
    outcome = weightctl("bench", model, "--scenario", "model", "--strategy", "torch", "--strategy", "safetensors")
    assert outcome.code == 2
    assert "one load" in outcome.stderr


def test_a_command_ends_with_who_ran_it() -> None:
    word = f"600.{os.getpid()}"
    code = f"from weightctl.benchmark.engines.commands import run_command; run_command('sleep', '{word}', timeout=900)"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        models.wait_for(lambda: ["sleep", word] in command_lines())
    finally:
        process.kill()
        process.wait()
    models.wait_for(lambda: ["sleep", word] not in command_lines())


def test_a_command_is_ended_in_time_and_its_last_word_is_kept() -> None:
    with pytest.raises(WeightctlError, match=r"sleep was stopped: it had not ended after 0\.2 seconds"):
        run_command("sleep", "60", timeout=0.2)
    with pytest.raises(WeightctlError, match="sh failed: why"):
        run_command("sh", "-c", "echo first >&2; echo why >&2; exit 3", timeout=300)
    seen: list[str] = []
    assert run_command("sh", "-c", 'echo a; echo "$B"', timeout=300, see=seen.append, variables={"B": "b"}) == "a\nb\n"
    assert seen == ["a\n", "b\n"]
