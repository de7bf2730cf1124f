"""Tensorizer files that lie: refused, never believed, and never waited for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders.stored import stored
from weightctl.loaders.tensorizer import EXTRAS, HEADER, TensorizerLoader, check_tensorizer
from weightctl.progress import Progress, Task
from weightctl.sources.directory import read_directory

WEIGHT = torch.arange(6.0).reshape(2, 3)
TENSORS = {"weight": WEIGHT, "half": torch.ones(5, dtype=torch.bfloat16), "tied": WEIGHT, "none": torch.empty(0, 3)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.tensors"
    TensorizerLoader().write(stored(TENSORS), path, Task())
    return path.read_bytes()


def load(directory: Path) -> dict[str, torch.Tensor]:
    return TensorizerLoader().load(read_directory(directory), "cpu")


def test_what_was_written_is_read(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "model.tensors").write_bytes(whole)
    tensors = load(tmp_path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert tensors["weight"] is tensors["tied"]
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert check_tensorizer(tmp_path / "model.tensors", progress=Progress()).problems == ()


def test_other_readers_find_their_tensors(tmp_path: Path, whole: bytes) -> None:
    """The library reads the file; only what is tied or empty is in weightctl's own place."""
    from tensorizer import TensorDeserializer

    (tmp_path / "model.tensors").write_bytes(whole)
    with TensorDeserializer(tmp_path / "model.tensors", device="cpu") as file:
        assert set(file.keys()) == {"weight", "half", EXTRAS}
        assert torch.equal(file["weight"], WEIGHT)


# The header, the index, and where the tensors themselves begin: the rest of the index is zeros.
PLACES = st.one_of(st.integers(0, 400), st.integers(HEADER.size + 256 * 1024, HEADER.size + 256 * 1024 + 800))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLACES, st.binary(min_size=1, max_size=8))
@example(HEADER.size - 8, (1 << 62).to_bytes(8, "little"))
@example(HEADER.size - 8, (300_000).to_bytes(8, "little"))
@example(HEADER.size - 16, (1 << 40).to_bytes(8, "little"))
def test_no_damage_does_harm(tmp_path: Path, whole: bytes, place: int, damage: bytes) -> None:
    damaged = bytearray(whole)
    damaged[place : place + len(damage)] = damage
    (tmp_path / "model.tensors").write_bytes(damaged[: len(whole)])
    try:
        tensors = load(tmp_path)
    except WeightctlError as error:
        assert error.exit_code in (2, 3)  # noqa: PT017
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) < len(whole)


@pytest.mark.parametrize("length", [0, 2, 5, HEADER.size - 1])
def test_a_file_that_ends_before_its_index(tmp_path: Path, whole: bytes, length: int) -> None:
    (tmp_path / "model.tensors").write_bytes(whole[:length])
    with pytest.raises(IntegrityError, match="is no Tensorizer file" if length < 5 else "ends within its header"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["weight", "half"])
def test_a_flipped_bit_is_found(tmp_path: Path, whole: bytes, name: str) -> None:
    path = tmp_path / "model.tensors"
    data = TENSORS[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(data) + 5] ^= 1
    path.write_bytes(damaged)
    check = check_tensorizer(path, progress=Progress())
    assert check.problems == (f"the tensor {name} is damaged: its bytes are not those that were written",)


@pytest.mark.parametrize(
    "extras",
    [
        {"ties": {"a": "nowhere"}, "empty": {}},
        {"ties": {"weight": "half"}, "empty": {}},
        {"ties": {}, "empty": {"a": ["float32", [1 << 40]]}},
        {"ties": {}, "empty": {"a": ["float32", [-1, 0]]}},
        {"ties": {}, "empty": {"a": ["load", [0]]}},
        {"ties": {}, "empty": {"weight": ["float32", [0]]}},
        {"ties": {"a": ["b"]}, "empty": {}},
        {"ties": []},
        [],
    ],
)
def test_extras_that_lie_are_refused(tmp_path: Path, extras: object) -> None:
    encoded = torch.frombuffer(bytearray(json.dumps(extras).encode()), dtype=torch.uint8)
    tensors = {"weight": WEIGHT, "half": TENSORS["half"], EXTRAS: encoded}
    TensorizerLoader().write(stored(tensors), tmp_path / "model.tensors", Task())
    with pytest.raises(IntegrityError):
        load(tmp_path)


def test_a_name_that_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(WeightctlError, match="cannot hold"):
        TensorizerLoader().write(stored({"x" * 70_000: WEIGHT}), tmp_path / "model.tensors", Task())


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "key"
    path.write_bytes(bytes(range(32)))
    monkeypatch.setenv("WEIGHTCTL_TENSORIZER_KEY", str(path))
    return path


def test_an_encrypted_file(tmp_path: Path, key: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "encrypted"
    directory.mkdir()
    before = WEIGHT.clone()
    TensorizerLoader().write(stored(TENSORS), directory / "model.tensors", Task())
    assert torch.equal(WEIGHT, before)
    plain = WEIGHT.numpy().tobytes()
    assert plain in whole
    assert plain not in (directory / "model.tensors").read_bytes()
    tensors = load(directory)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert check_tensorizer(directory / "model.tensors", progress=Progress()).problems == ()
    (tmp_path / "model.tensors").write_bytes(whole)
    assert load(tmp_path).keys() == TENSORS.keys()
    key.write_bytes(bytes(32))
    with pytest.raises(IntegrityError, match="encrypted with another key, or is damaged"):
        load(directory)
    key.write_bytes(bytes(31))
    with pytest.raises(UsageError, match="is no key of 32 bytes"):
        load(directory)
    monkeypatch.delenv("WEIGHTCTL_TENSORIZER_KEY")
    with pytest.raises(UsageError, match=r"model\.tensors is encrypted"):
        load(directory)


@pytest.mark.parametrize("readers", ["1", "3"])
def test_readers(tmp_path: Path, whole: bytes, readers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCTL_TENSORIZER_READERS", readers)
    (tmp_path / "model.tensors").write_bytes(whole)
    assert torch.equal(load(tmp_path)["weight"], WEIGHT)


def test_a_part_is_read_and_converted(tmp_path: Path, whole: bytes) -> None:
    (tmp_path / "model.tensors").write_bytes(whole)
    dtypes = {"tied": torch.float16, "half": torch.float32}
    found = TensorizerLoader().load_part(read_directory(tmp_path), "cpu", ["tied", "half"], dtypes)
    assert found.keys() == {"tied", "half"}
    assert torch.equal(found["tied"], WEIGHT.half())
    assert found["half"].dtype == torch.float32
