"""`weightctl advise` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import weightctl
from tests.hub_server import Hub
from weightctl.benchmark.results import SCHEMA
from weightctl.cli.options import bandwidth
from weightctl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500MB", 5e8), ("1.5GiB", 1.5 * 2**30), ("10Gbit", 1.25e9), ("10Gbps", 1.25e9), ("8 kB/s", 8e3), ("1B", 1),
        ("100Mbit/s", 1.25e7),
    ],
)  # fmt: skip
def test_bandwidths(text: str, value: float) -> None:
    assert bandwidth(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "500", "MB", "-1MB", "0MB", "1e3MB", "5mb", "5Gb", "nanMB", "1 GB a day", "٣MB"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(UsageError, match="not a bandwidth"):
        bandwidth(text)


def bench_file(path: Path) -> Path:
    def stage(name: str, size: int, seconds: float) -> dict[str, object]:
        return {"name": name, "bytes": size, "seconds": seconds}

    def scenario(kind: str, way: str, *stages: dict[str, object]) -> dict[str, object]:
        found = {"scenario": kind, "way": way, "jobs": None, "status": "ok", "seconds": [9.0], "median_seconds": 9.0}
        return {**found, "stages": [*stages, stage("start", 0, 2.0)], "layers": 4}

    gb = 10**9
    value = {
        "schema": SCHEMA, "created": "2026-11-22T04:00:00Z", "environment": {"cpus": 16, "memory_bytes": 100 * gb},
        "ceilings": {"cold_read": 1e9}, "limits": [], "results": [],
        "model": {"name": "m", "commit": None, "format": "safetensors", "files": 1, "tensors": 1, "bytes": gb},
        "settings": {
            "device": "cpu", "strategies": ["auto"], "caches": ["cold"], "runs": 1, "precision": 0, "confidence": 0.95,
            "timeout": 60, "workers": 2,
        },
        "scenarios": [
            scenario("image", "docker", stage("pull", gb, 1.0), stage("unpack", gb, 1.5), stage("load", gb, 0.25)),
            scenario("model", "in place", stage("load", gb, 2.0)),
        ],
    }  # fmt: skip
    path.write_text(json.dumps(value))
    return path


def test_from_a_bench_of_whole_starts(minilm: Path, tmp_path: Path) -> None:
    arguments = ("advise", minilm, "--bench", bench_file(tmp_path / "b.json"), "--bandwidth-registry", "10MB")
    outcome = weightctl(*arguments, "--replicas", 3, "--json")
    assert outcome.code == 0, outcome.stderr
    result = outcome.result
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert figures["load"]["value"] == pytest.approx(4e9)
    assert figures["load_cold"]["value"] == pytest.approx(5e8)
    assert figures["unpack"]["value"] == pytest.approx(5e8)  # 1.25 passes over 1 GB in 2.5 s
    assert figures["start"]["value"] == pytest.approx(2.0)
    assert result["circumstances"]["cores"] == 16
    assert result["recommendation"] == "volume"
    container = next(option for option in result["options"] if option["name"] == "container")
    assert container["start"][0]["bound"] == "registry"
    assert container["start_seconds"] == pytest.approx(result["bytes"] / 1e7, rel=0.5)
    shown = weightctl(*arguments, COLUMNS="80")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "recommended: volume" in shown.stdout
    assert "from the bench:" in shown.stdout


def test_a_bench_that_tells_nonsense(minilm: Path, tmp_path: Path) -> None:
    path = bench_file(tmp_path / "b.json")
    value = json.loads(path.read_text())
    value["environment"] = {"cpus": "many", "memory_bytes": 0.5, "device": "\x1b[31m"}
    value["ceilings"]["cold_read"] = 1e-9
    for stage in value["scenarios"][0]["stages"][:2]:
        stage |= {"bytes": 0, "seconds": 0}
    path.write_text(json.dumps(value))
    outcome = weightctl("advise", minilm, "--bench", path)
    assert outcome.code == 0, outcome.stderr
    assert "to \\x1b[31m" in outcome.stdout
    assert outcome.stdout.count("measured here: ") == 1
    value["scenarios"][1]["stages"][0]["bytes"] = 0
    path.write_text(json.dumps(value))
    assert "lacks what is needed: a load from the disk" in weightctl("advise", minilm, "--bench", path).stderr


def test_a_hub_model_is_not_downloaded(hub: Hub, minilm: Path, tmp_path: Path, home: Path) -> None:
    files = {path.relative_to(minilm).as_posix(): path.read_bytes() for path in minilm.rglob("*") if path.is_file()}
    hub.add("org/minilm", files)
    outcome = weightctl("advise", "org/minilm", "--bench", bench_file(tmp_path / "b.json"), "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.result["bytes"] == sum(map(len, files.values()))
    assert not list(home.rglob("*.safetensors"))


def test_it_measures_this_machine(minilm: Path) -> None:
    outcome = weightctl("advise", minilm, "--device", "cpu", COLUMNS="80")
    assert outcome.code == 0, outcome.stderr
    assert "measuring this machine" in outcome.stderr
    assert "No engine was measured" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_a_bench_that_lacks_something(minilm: Path, tmp_path: Path) -> None:
    path = bench_file(tmp_path / "b.json")
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "scenarios": value["scenarios"][:1]}))
    outcome = weightctl("advise", minilm, "--bench", path)
    assert outcome.code == 2
    assert "lacks what is needed: a load from the disk" in outcome.stderr
    path.write_text("[]")
    assert weightctl("advise", minilm, "--bench", path).code == 2
    assert weightctl("advise", minilm, "--bandwidth-volume", "fast").code == 2
