"""A bench times what is right, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny_models as models
from tests.benchmark.test_summary import noisy, result
from tests.command import start
from tests.command import weightctl as command
from tests.models import wait_for
from weightctl.benchmark.results import BenchResult, Row, read_result, write_result
from weightctl.benchmark.runner import Job, run_load
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError
from weightctl.loaders import loaders, open_stored
from weightctl.operations.bench import bench as operation
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.storage import TEMPORARY_SUFFIX

ROW = [
    "strategy", "cache", "status", "reason", "seconds", "median_seconds", "bytes_per_second", "verified",
    "peak_host_bytes", "peak_device_bytes",
]  # fmt: skip


def bench(model: Path, *strategies: str, runs: int = 1, **options: object) -> BenchResult:
    """Without a round to warm up."""
    config = Config(runs=runs, device="cpu")
    given = {"warm_up": False, **options}
    return operation(str(model), strategies=strategies, **given, config=config, progress=Progress())  # type: ignore[arg-type]


def row(result: BenchResult, strategy: str) -> Row:
    return next(row for row in result.results if row.strategy == strategy)


def small_model(directory: Path, size: int = 1000) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.rand(size), "b": torch.rand(3)}, directory / "model.safetensors")
    return directory


def processes(word: str) -> set[int]:
    """Those that live and whose command line holds `word`."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def children(parent: int) -> set[int]:
    """The measuring processes of a bench."""
    started = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {int(child) for child in started} & processes("weightctl.benchmark.child")


def start_with_fakes(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """The command line of a weightctl that knows the strategies of tests/benchmark/strategies.py too."""
    code = "import tests.benchmark.strategies; from weightctl.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2], env={**os.environ, **variables}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategies of tests/benchmark/strategies.py, for one test."""
    monkeypatch.setattr(loaders, "_backends", dict(loaders._backends))
    sys.modules.pop("tests.benchmark.strategies", None)
    importlib.import_module("tests.benchmark.strategies")


@pytest.mark.usefixtures("disk")
def test_a_real_model_as_a_user_does_it(minilm: Path, tmp_path: Path, home: Path) -> None:
    model = shutil.copytree(minilm, home / "model")  # what nobody else has mapped, and so can be dropped from the cache
    caches = ("--cache", "warm", "--cache", "cold")
    arguments = ("--device", "cpu", "--runs", 1, *caches, "--strategy", "pipelined", "--output", "result.json")
    outcome = command("bench", model, *arguments, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert outcome.code == 0, outcome.stderr
    assert max(len(line) for line in outcome.stdout.splitlines() if " unavailable: " not in line) <= 80
    assert [path.name for path in tmp_path.iterdir() if "torch" not in path.name] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"environment", "ceilings", "model", "results"} <= result.keys()
    assert result["ceilings"].keys() == {"warm_read", "warm_map", "cold_read"}
    assert (result["schema"], result["complete"]) == (1, True)
    assert read_result(tmp_path / "result.json").model.tensors == 104
    assert [result["model"][key] for key in ("bytes", "tensors", "format")] == [90_856_960, 104, "safetensors"]
    available = [row for row in result["results"] if row["status"] != "unavailable"]
    assert len(available) == 2
    for measured in available:
        assert list(measured)[: len(ROW)] == ROW
        assert measured["status"] == "ok", measured
        assert len(measured["seconds"]) == 1
        assert measured["verified"] is True
        assert measured["bytes_per_second"] == pytest.approx(90_856_960 / measured["median_seconds"])
        assert measured["peak_host_bytes"] > 90_856_960
        assert measured["share"] > 0
        assert [run["round"] for run in measured["runs"]] == [0, 1]
        assert measured["phases"].keys() == {"start", "imports", "device", "loading"}
        assert measured["residency"] <= 0.05 if measured["cache"] == "cold" else measured["residency"] >= 0.95
        assert measured["strategy"] in outcome.stdout
    private = (str(tmp_path), str(model), os.uname().nodename, str(Path.home()))
    assert not any(word in json.dumps(result["environment"]) for word in private)


def test_a_state_dict_and_what_cannot_load_it(crepe: Path) -> None:
    result = bench(crepe, "safetensors", "torch", "transformers", include=["tiny.pth"])
    assert {row.strategy for row in result.results if row.status == "ok"} == {"safetensors", "torch"}
    assert row(result, "transformers").status == "unavailable"
    assert "config.json" in str(row(result, "transformers").reason)
    assert row(result, "transformers").seconds == ()


def test_transformers_that_converts_is_found_out(tmp_path: Path) -> None:
    directory = models.saved(models.llama(), tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    measured = row(bench(directory, "transformers"), "transformers")
    assert measured.status == "failed"
    assert "float16" in str(measured.reason)


def test_a_model_is_built_around_what_was_converted_too(tmp_path: Path) -> None:
    measured = row(bench(models.saved(models.llama(), tmp_path), "tensorizer", construct=True), "tensorizer")
    assert measured.status == "ok", measured.reason
    assert measured.phases["construction"] > 0


@pytest.mark.usefixtures("fakes")
def test_what_loads_something_else_is_failed_not_timed(tmp_path: Path) -> None:
    expected = {
        "one-bit": "bytes of b",
        "one-less": "lacks b",
        "crashes": "it crashed with SIGSEGV",
        "killed": "it crashed with SIGKILL (out of memory?)",
        "raises": "ZeroDivisionError: a bug",
    }
    result = bench(small_model(tmp_path), *expected, "missing", "safetensors")
    for strategy, words in expected.items():
        measured = row(result, strategy)
        assert measured.status == "failed"
        assert words in str(measured.reason)
        assert (measured.seconds, measured.median_seconds, measured.verified) == ((), None, False)
    assert row(result, "missing").status == "unavailable"
    assert "pip install 'weightctl[torch]'" in str(row(result, "missing").reason)
    assert row(result, "safetensors").status == "ok"


@pytest.mark.usefixtures("fakes")
def test_what_hangs_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word = f"hanging-{tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv("HANGS", word)
    snapshot = read_directory(small_model(tmp_path))
    job = Job.of(open_stored(snapshot), "cpu", tmp_path, Config(timeout=8), Progress())
    measured = run_load(loaders.get("hangs")(), snapshot, "warm", 1, job)
    assert (measured.status, measured.reason) == ("failed", "it was stopped: it had not ended after 8 seconds")
    wait_for(lambda: not processes(word))


def test_an_interrupted_bench_shows_what_it_has_and_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    saved = tmp_path / "result.json"
    process = start(
        "bench", small_model(tmp_path / "model"), "--strategy", "safetensors", "--cache", "warm", "--precision", 0,
        "--runs", 1000, "--output", saved, TMPDIR=str(tmp_path / "tmp"),
    )  # fmt: skip
    wait_for(lambda: saved.exists() and children(process.pid))
    running = children(process.pid)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stderr.endswith("error: interrupted\nhint: the figures are of the runs before that\n")
    assert "safetensors" in stdout
    assert not read_result(saved).complete
    wait_for(lambda: not running & processes("weightctl.benchmark.child"))
    assert list((tmp_path / "tmp").glob("weightctl*")) == []


def test_a_killed_bench_leaves_no_process_and_the_next_one_no_file(tmp_path: Path, home: Path) -> None:
    model, temporary, saved = small_model(tmp_path / "model"), tmp_path / "tmp", home / ".cache" / "weightctl" / "bench"
    temporary.mkdir()
    (saved / f".killed{TEMPORARY_SUFFIX}").mkdir(parents=True)
    word = f"hanging-{tmp_path.name}-{os.getpid()}"
    process = start_with_fakes("bench", model, "--strategy", "hangs", TMPDIR=str(temporary), HANGS=word)
    wait_for(lambda: processes(word))
    running = children(process.pid)
    assert running
    process.kill()
    process.communicate()
    wait_for(lambda: not processes(word) | running & processes("weightctl.benchmark.child"))
    assert len(list(temporary.glob("weightctl-*"))) == 1
    arguments = ("bench", model, "--strategy", "safetensors", "--runs", 1, "--device", "cpu", "--json")
    outcome = command(*arguments, TMPDIR=str(temporary))
    assert outcome.code == 0, outcome.stderr
    assert [row["strategy"] for row in outcome.result["results"]] == ["safetensors"]
    assert list(temporary.glob("weightctl-*")) == []
    assert [path.suffix for path in saved.iterdir()] == [".json"]


def test_saved_results_are_compared_shown_and_judged(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path, seconds in ((old, 1.0), (new, 1.2)):
        delayed = dataclasses.replace(noisy(seconds, 2), strategy="delayed")
        write_result(result(noisy(1.0, 1), delayed), path)

    def show(*arguments: object) -> tuple[int, str]:
        outcome = command("bench", *arguments, COLUMNS="80")
        return outcome.code, outcome.stdout + outcome.stderr

    reports = [tmp_path / f"report.{ending}" for ending in ("html", "svg", "md", "csv", "json")]
    wanted = [word for report in reports for word in ("--report", report)]
    code, words = show("--from", new, "--compare", old, "--fail-below", "a>=0.4", *wanted)
    assert code == 0, words
    verdicts = [line.split()[-1] for line in words.splitlines() if line.rstrip().endswith(("same", "slower"))]
    assert verdicts == ["same", "slower"]
    assert all("delayed" in report.read_text() for report in reports)
    code, words = show("--from", new, "--fail-below", "delayed/warm>=0.999")
    assert (code, "less than 0.999" in words) == (1, True)
    (tmp_path / "bad.json").write_text('{"schema": 1}')
    (tmp_path / "foreign.json").write_text(json.dumps({**json.loads(new.read_text()), "schema": 2}))
    for arguments, why in {
        ("--from", tmp_path / "bad.json"): "no result of weightctl bench",
        ("--from", new, "--compare", tmp_path / "foreign.json"): "its schema is 2",
        ("--from", new, "--fail-below", "a>0.7"): "not a floor",
    }.items():
        code, words = show(*arguments)
        assert (code, why in words) == (2, True), words


@pytest.mark.usefixtures("disk", "fakes")
def test_a_run_that_was_not_cold_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELD", str(tmp_path / "held"))
    measured = row(bench(small_model(tmp_path / "model", 200_000), "holds-once", caches=["cold"], runs=2), "holds-once")
    assert measured.status == "ok"
    assert [run.mark for run in measured.runs] == ["it was not cold: 100 % of the files was cached", None]
    assert measured.seconds == (measured.runs[1].seconds,)
    assert measured.residency == measured.runs[1].residency
    assert measured.residency is not None
    assert measured.residency <= 0.05


def test_a_scratch_directory_is_kept_and_used_again(tmp_path: Path) -> None:
    model, scratch = small_model(tmp_path / "model"), tmp_path / "a" / "scratch"
    assert row(bench(model, "torch", scratch=scratch), "torch").status == "ok"
    made = list(scratch.glob("*/*"))
    assert [path.name for path in made] == ["pytorch_model.bin"]
    stamp = made[0].stat().st_mtime_ns
    assert row(bench(model, "torch", scratch=scratch), "torch").status == "ok"
    assert [path.stat().st_mtime_ns for path in scratch.glob("*/*")] == [stamp]
    small_model(tmp_path / "model")
    assert row(bench(model, "torch", scratch=scratch), "torch").status == "ok"
    assert len(list(scratch.glob("*/*"))) == 2


def test_code_in_the_working_directory_does_not_run(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    for name in ("json", "torch", "weightctl", "safetensors"):
        (model / f"{name}.py").write_text("import os; os.mkdir('it ran')")
    weightctl = shutil.which("weightctl", path=str(Path(sys.executable).parent))
    assert weightctl is not None
    command = [weightctl, "bench", ".", "--runs", "1", "--strategy", "safetensors"]
    outcome = subprocess.run(command, cwd=model, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert not (model / "it ran").exists()


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    with pytest.raises(UsageError, match="unknown strategy"):
        bench(model, "fastest")
    with pytest.raises(UsageError, match="unknown cache state 'hot'"):
        bench(model, caches=["hot"])
    with pytest.raises(UsageError, match="does not exist"):
        bench(model, output=tmp_path / "no" / "result.json")
    with pytest.raises(UsageError, match="is a directory"):
        bench(model, output=tmp_path)
    outcome = command("bench", model, "--device", "cuda:99")
    assert outcome.code == 2
    assert "cuda:99" in outcome.stderr
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(IntegrityError):
        bench(model)
    save_file({"empty": torch.empty(0)}, model / "model.safetensors")
    with pytest.raises(UsageError, match="no bytes"):
        bench(model)
