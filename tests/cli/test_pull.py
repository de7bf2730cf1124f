"""weightctl pull, as a user runs it, against a Hub that behaves and one that does not."""

from __future__ import annotations

import filecmp
import os
import signal
from pathlib import Path

import pytest

from tests import models
from tests.command import Outcome, interrupt, start, weightctl
from tests.disk import small_disk
from tests.hub_server import Fault, Hub

TOKEN = "hf_aVerySecretTokenThatNobodyMaySee"
WEIGHTS = "model.safetensors"
SMALL = {"config.json": b"{}", WEIGHTS: b"weights" * 1000}


def cache(home: Path, repo_id: str = "org/name") -> Path:
    return home / "hf" / "hub" / f"models--{repo_id.replace('/', '--')}"


def incomplete(directory: Path) -> list[Path]:
    return list(directory.rglob("*.incomplete"))


def assert_equal_models(one: Path, other: Path) -> None:
    paths = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert paths
    for path in paths:
        assert filecmp.cmp(one / path, other / path, shallow=False), path


def failed(outcome: Outcome, code: int, *words: str) -> None:
    """It ended with `code` and said each of `words`, with a hint, and nothing on stdout."""
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    assert "error: " in outcome.stderr
    assert "hint: " in outcome.stderr
    for word in words:
        assert word in outcome.stderr


@pytest.fixture
def minilm_hub(hub: Hub, minilm: Path) -> Hub:
    """The real model on the Hub."""
    hub.add("org/name", minilm)
    return hub


def test_a_directory_that_is_not_written_as_a_path(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/name", SMALL)
    (tmp_path / "org" / "name").mkdir(parents=True)
    done = weightctl("pull", "org/name", cwd=tmp_path)
    assert (done.code, Path(done.stdout.strip()).parent.name) == (0, "snapshots")
    assert "note: org/name is looked for on the Hub; the directory here is ./org/name\n" in done.stderr
    assert "note: " not in weightctl("pull", "org/name").stderr


def test_a_real_model(minilm_hub: Hub, minilm: Path, home: Path) -> None:
    total = sum(path.stat().st_size for path in minilm.rglob("*") if path.is_file())
    commit = minilm_hub.repositories["org/name"].revisions["main"]

    plan = weightctl("pull", "org/name", "--dry-run", "--json").result
    assert (plan["files"], plan["missing_files"], plan["missing_bytes"]) == (13, 13, total)
    assert minilm_hub.fetched() == {}
    assert not cache(home).exists()

    first = weightctl("pull", "org/name", "--json").result
    assert first == {
        "model": "org/name", "revision": "main", "commit": commit, "path": str(cache(home) / "snapshots" / commit),
        "files": 13, "bytes": total, "fetched_bytes": total, "verified": True, "seconds": first["seconds"],
    }  # fmt: skip
    assert_equal_models(minilm, Path(first["path"]))
    assert sum(minilm_hub.fetched().values()) == total

    minilm_hub.requests.clear()
    second = weightctl("pull", "hf://org/name", "--json").result
    assert (second["fetched_bytes"], second["path"], second["verified"]) == (0, first["path"], True)
    assert weightctl("pull", "org/name", "--dry-run", "--json").result["missing_bytes"] == 0
    assert minilm_hub.fetched() == {}


def test_stdout_is_the_path_alone(hub: Hub, home: Path) -> None:
    commit = hub.add("org/name", SMALL)
    outcome = weightctl("pull", "org/name")
    assert outcome.code == 0
    assert outcome.stdout == f"{cache(home) / 'snapshots' / commit}\n"
    assert "2 files" in outcome.stderr


def test_pull_to_a_directory(minilm_hub: Hub, minilm: Path, tmp_path: Path, home: Path) -> None:
    there = tmp_path / "my models" / "minilm"
    result = weightctl("pull", "org/name", "--to", there, "--json").result
    assert result["path"] == str(there)
    assert_equal_models(minilm, there)
    assert not any(path.is_symlink() for path in there.rglob("*"))
    assert not list(cache(home).rglob(WEIGHTS))
    minilm_hub.requests.clear()
    assert weightctl("pull", "org/name", "--to", there, "--json").result["fetched_bytes"] == 0
    assert minilm_hub.fetched() == {}
    assert weightctl("verify", there).stderr.startswith("done: 13 files")
    models.flip_bit(there / WEIGHTS)
    models.flip_bit(there / "vocab.txt")
    failed(weightctl("verify", there), 3, f"{WEIGHTS} is damaged", "vocab.txt is damaged")


def test_a_killed_pull_goes_on_where_it_was(minilm_hub: Hub, minilm: Path, home: Path) -> None:
    minilm_hub.faults[WEIGHTS] = Fault(stall_at=50 << 20)
    process = start("pull", "org/name")
    assert minilm_hub.stalled.wait(300)
    models.wait_for(lambda: len(list((cache(home) / "blobs").glob("[0-9a-f]" * 40))) == 12)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert incomplete(cache(home))
    assert not list(cache(home).glob(f"snapshots/*/{WEIGHTS}"))

    minilm_hub.faults.clear()
    minilm_hub.requests.clear()
    assert weightctl("pull", "org/name", "--dry-run", "--json").result["missing_files"] == 1
    result = weightctl("pull", "org/name", "--json").result
    assert set(minilm_hub.fetched()) == {WEIGHTS}
    assert result["fetched_bytes"] == (minilm / WEIGHTS).stat().st_size
    assert_equal_models(minilm, Path(result["path"]))
    assert incomplete(cache(home)) == []


def test_a_killed_pull_to_a_directory_goes_on_where_it_was(minilm_hub: Hub, minilm: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    minilm_hub.faults[WEIGHTS] = Fault(stall_at=50 << 20)
    process = start("pull", "org/name", "--to", there)
    assert minilm_hub.stalled.wait(300)
    models.wait_for(lambda: (there / "vocab.txt").exists())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (there / WEIGHTS).exists()

    minilm_hub.faults.clear()
    minilm_hub.requests.clear()
    assert weightctl("pull", "org/name", "--to", there).code == 0
    assert set(minilm_hub.fetched()) == {WEIGHTS}
    assert_equal_models(minilm, there)
    assert incomplete(there) == []


def test_an_interrupted_pull_stops_and_says_so(minilm_hub: Hub, home: Path) -> None:
    minilm_hub.faults[WEIGHTS] = Fault(stall_at=50 << 20, times=1)
    process = start("pull", "org/name")
    assert minilm_hub.stalled.wait(300)
    interrupt(process)
    minilm_hub.go_on.set()
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == ""
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not list(cache(home).glob(f"snapshots/*/{WEIGHTS}"))
    assert incomplete(cache(home)) == []


def test_a_connection_cut_once_is_not_even_noticed(minilm_hub: Hub, minilm: Path) -> None:
    minilm_hub.faults[WEIGHTS] = Fault(cut_at=40 << 20, times=1)
    minilm_hub.faults["vocab.txt"] = Fault(cut_at=1000, times=1)
    result = weightctl("pull", "org/name", "--json").result
    assert_equal_models(minilm, Path(result["path"]))


def test_a_connection_cut_at_every_try_is_an_error_and_a_later_pull_goes_on(hub: Hub, home: Path) -> None:
    hub.add("org/name", SMALL)
    hub.faults[WEIGHTS] = Fault(cut_at=1000)
    failed(weightctl("pull", "org/name"), 1, "org/name", "run this again")
    assert incomplete(cache(home)) == []
    hub.faults.clear()
    hub.requests.clear()
    assert weightctl("pull", "org/name").code == 0
    assert set(hub.fetched()) == {WEIGHTS}


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("to", [False, True])
def test_wrong_bytes_are_named_and_do_not_stay(hub: Hub, tmp_path: Path, path: str, to: bool) -> None:
    options = ["--to", str(tmp_path / "there")] if to else []
    hub.add("org/name", SMALL)
    hub.faults[path] = Fault(flip_at=1)
    failed(weightctl("pull", "org/name", *options), 3, path)
    hub.faults.clear()
    hub.requests.clear()
    result = weightctl("pull", "org/name", *options, "--json").result
    assert set(hub.fetched()) == {path}
    assert {name: (Path(result["path"]) / name).read_bytes() for name in SMALL} == SMALL


def test_a_flipped_bit_in_a_cached_file(minilm_hub: Hub, minilm: Path) -> None:
    path = Path(weightctl("pull", "org/name", "--json").result["path"])
    for name in (WEIGHTS, "1_Pooling/config.json"):
        with (path / name).open("r+b") as stream:
            stream.seek(100)
            byte = stream.read(1)[0]
            stream.seek(100)
            stream.write(bytes([byte ^ 1]))
        failed(weightctl("pull", "org/name"), 3, name)
        minilm_hub.requests.clear()
        assert weightctl("pull", "org/name").code == 0
        assert set(minilm_hub.fetched()) == {name}
    assert_equal_models(minilm, path)


def test_a_cached_file_that_was_cut_short(hub: Hub) -> None:
    hub.add("org/name", SMALL)
    path = Path(weightctl("pull", "org/name", "--json").result["path"])
    os.truncate(path / WEIGHTS, 100)
    assert weightctl("pull", "org/name").code in (0, 3)
    assert weightctl("pull", "org/name").code == 0
    assert (path / WEIGHTS).read_bytes() == SMALL[WEIGHTS]


def test_a_token_opens_what_it_may_and_is_never_shown(hub: Hub, home: Path) -> None:
    hub.tokens = {TOKEN: {"org/gated", "org/private"}, "hf_other": set()}
    hub.add("org/gated", SMALL, gated=True)
    hub.add("org/private", SMALL, private=True)
    outcomes = []

    def pull(*arguments: object, **variables: str) -> Outcome:
        outcomes.append(weightctl("pull", *arguments, **variables))
        return outcomes[-1]

    failed(pull("org/gated"), 1, "gated", "https://huggingface.co/org/gated", "HF_TOKEN")
    failed(pull("org/gated", HF_TOKEN="hf_other"), 1, "gated")
    failed(pull("org/private"), 1, "org/private", "HF_TOKEN")
    failed(pull("org/private", HF_TOKEN="hf_wrong"), 1, "org/private", "token")
    assert pull("org/gated", HF_TOKEN=TOKEN).code == 0
    (home / "hf").mkdir(exist_ok=True)
    (home / "hf" / "token").write_text(TOKEN)
    assert pull("org/private", "--json").code == 0
    hub.faults["/api/"] = Fault(status=500, times=1)
    pull("org/private", "--to", home / "there")
    hub.faults[WEIGHTS] = Fault(flip_at=0)
    pull("org/private", "--to", home / "elsewhere")

    assert any(request.token == TOKEN for request in hub.requests)
    assert any(request.server == "cdn" for request in hub.requests)
    assert all(request.token is None for request in hub.requests if request.server == "cdn")
    for outcome in outcomes:
        assert "hf_" not in outcome.stdout + outcome.stderr


def test_what_is_not_there(hub: Hub, home: Path) -> None:
    hub.add("org/name", SMALL)
    hub.add("org/empty", {})
    failed(weightctl("pull", "org/missing"), 1, "org/missing", "check the name")
    (home / "org" / "missing").mkdir(parents=True)
    failed(weightctl("pull", "org/missing", cwd=home), 1, "a directory is written as a path: ./org/missing")
    failed(weightctl("pull", "org/name@nope"), 1, "'nope'", "check the branch, tag or commit")
    failed(weightctl("pull", "org/name", "--revision", "0" * 40), 1, "0" * 40)
    failed(weightctl("pull", "org/name", "--revision", "../x"), 2, "'../x'", "give a branch, tag or commit")
    failed(weightctl("pull", "org/empty"), 2, "no files in org/empty", "empty")
    failed(weightctl("pull", "org/name", "--include", "*.gguf"), 2, "no files in org/name", "--include")


@pytest.mark.parametrize("model", ["org/na me", "", "a/b/c", "volume:x", "org--name/x", "org/name.git"])
def test_what_is_no_model(hub: Hub, model: str) -> None:
    outcome = weightctl("pull", model)
    assert outcome.code == 2
    assert "error: " in outcome.stderr


def test_no_network(home: Path) -> None:
    failed(weightctl("pull", "org/name", HF_ENDPOINT="http://127.0.0.1:1"), 1, "cannot be reached", "check the network")
    failed(weightctl("pull", "org/name", HF_ENDPOINT="http://name.invalid"), 1, "cannot be reached")
    failed(weightctl("pull", "org/name", HF_HUB_OFFLINE="1"), 1, "HF_HUB_OFFLINE")
    assert not cache(home).exists()


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}])
def test_without_a_network_a_complete_cache_is_enough(hub: Hub, variables: dict[str, str]) -> None:
    commit = hub.add("org/name", SMALL)
    failed(weightctl("pull", "org/name", **variables), 1)
    assert weightctl("pull", "org/name", "--include", "*.json").code == 0
    failed(weightctl("pull", "org/name", **variables), 1)
    online = weightctl("pull", "org/name", "--json").result
    offline = weightctl("pull", "org/name", "--json", **variables)
    assert "as it is cached" in offline.stderr
    assert {**offline.result, "seconds": 0} == {**online, "fetched_bytes": 0, "seconds": 0}
    assert offline.result["commit"] == commit
    assert weightctl("pull", f"org/name@{commit}", **variables).code == 0


def test_without_a_network_a_damaged_cache_is_noticed(hub: Hub) -> None:
    hub.add("org/name", SMALL)
    path = Path(weightctl("pull", "org/name", "--json").result["path"])
    (path / WEIGHTS).write_bytes(b"Weights" * 1000)
    failed(weightctl("pull", "org/name", HF_HUB_OFFLINE="1"), 3, WEIGHTS)


def test_a_hub_that_is_unwell(hub: Hub) -> None:
    hub.add("org/name", SMALL)
    hub.faults["/api/"] = Fault(status=500, times=1)
    failed(weightctl("pull", "org/name"), 1, "500", "try again later")
    hub.faults[WEIGHTS] = Fault(status=403)
    failed(weightctl("pull", "org/name"), 1, "refuses access to org/name (HTTP 403)", "check the token")


def test_a_disk_without_room_is_told_before_anything_moves(minilm_hub: Hub, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 40 << 20) as disk:
        failed(weightctl("pull", "org/name", "--cache-dir", disk), 1, str(disk), "free some space")
        failed(weightctl("pull", "org/name", "--to", disk / "model"), 1, str(disk), "free some space")
    assert minilm_hub.fetched() == {}


@pytest.mark.parametrize("option", ["--cache-dir", "--to"])
def test_a_disk_that_fills_up_on_the_way(minilm_hub: Hub, minilm: Path, tmp_path: Path, option: str) -> None:
    with small_disk(tmp_path / "disk", 120 << 20) as disk:
        minilm_hub.faults[WEIGHTS] = Fault(stall_at=30 << 20, times=1)
        process = start("pull", "org/name", option, disk / "here")
        assert minilm_hub.stalled.wait(300)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(60 << 20))
        minilm_hub.go_on.set()
        stdout, stderr = process.communicate()
        failed(Outcome(process.returncode, stdout, stderr), 1, "No space left on device", "free some space")
        assert "Traceback" not in stderr
        assert not [path for path in disk.rglob("*") if path.name == WEIGHTS]
        ballast.unlink()
        result = weightctl("pull", "org/name", option, disk / "here", "--json").result
        assert_equal_models(minilm, Path(result["path"]))
