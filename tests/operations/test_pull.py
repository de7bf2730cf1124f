"""pull and plan_pull: what they say and what they did."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from tests.hub_server import Hub
from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError
from weightctl.operations.pull import PullResult, plan_pull, pull
from weightctl.progress import Progress

MODEL = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
SILENT = {"config": Config(workers=2), "progress": Progress()}


def test_a_pull_says_what_came(hub: Hub, home: Path) -> None:
    commit = hub.add("org/name", MODEL)
    first = pull("org/name", **SILENT)
    assert first == PullResult(
        model="org/name", revision="main", commit=commit,
        path=home / "hf" / "hub" / "models--org--name" / "snapshots" / commit,
        files=2, bytes=7002, fetched_bytes=7002, verified=True, seconds=first.seconds,
    )  # fmt: skip
    assert first.seconds > 0
    again = pull("hf://org/name", revision="main", **SILENT)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, fetched_bytes=0, seconds=0)


def test_a_plan_says_what_would_come(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", MODEL)
    pull("org/name", include=["*.json"], **SILENT)
    plan = plan_pull("org/name", **SILENT)
    assert (plan.files, plan.bytes, plan.missing_files, plan.missing_bytes) == (2, 7002, 1, 7000)
    elsewhere = plan_pull("org/name", to=tmp_path / "there", **SILENT)
    assert (elsewhere.path, elsewhere.missing_bytes) == (tmp_path / "there", 7002)
    assert not (tmp_path / "there").exists()


def test_a_directory_is_here_already(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = pull(str(tmp_path), **SILENT)
    assert (result.model, result.commit, result.path, result.fetched_bytes) == (tmp_path.name, None, tmp_path, 0)
    assert not result.verified  # there is nothing to compare its bytes with


def test_two_revisions_and_revisions_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two revisions"):
        pull("org/name@v1", revision="v2", **SILENT)
    with pytest.raises(UsageError, match="no revisions"):
        pull(str(tmp_path), revision="v2", **SILENT)


def test_two_pulls_of_one_model_at_once(hub: Hub) -> None:
    hub.add("org/name", {f"{n}.safetensors": b"%d" % n * 10_000 for n in range(20)})
    results: list[PullResult | WeightctlError] = []

    def run() -> None:
        try:
            results.append(pull("org/name", **SILENT))
        except WeightctlError as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({dataclasses.replace(r, seconds=0, fetched_bytes=0) for r in results if isinstance(r, PullResult)}) == 1
    assert not [result for result in results if isinstance(result, WeightctlError)]
