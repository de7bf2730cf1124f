"""What holds for every home of a format: it reads what it wrote, and says what it cannot."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

from tests.models import wait_for
from weightctl.errors import UsageError
from weightctl.loaders import FormatLoader, choose_device, choose_loader, loaders, open_stored, own_format, weight_files
from weightctl.loaders.stored import difference, stored
from weightctl.model import Snapshot
from weightctl.progress import Task
from weightctl.sources.directory import read_directory

HOMES = [name for name in loaders.names() if issubclass(loaders.get(name), FormatLoader)]
TENSORS = {
    "a.weight": torch.randn(4, 5),
    "a.bias": torch.randn(3).to(torch.bfloat16),
    "strided": torch.arange(12).reshape(3, 4).t(),
    "scalar": torch.tensor(3),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "ünï cödé/..": torch.tensor([float("nan")]),
}


def home(name: str) -> FormatLoader:
    loader = loaders.get(name)()
    assert isinstance(loader, FormatLoader)
    return loader


def written(name: str, directory: Path) -> Snapshot:
    directory.mkdir(exist_ok=True)
    home(name).write(stored(TENSORS), directory / home(name).filename, Task())
    return read_directory(directory)


@pytest.mark.parametrize("name", HOMES)
def test_a_home_reads_what_it_wrote(tmp_path: Path, name: str) -> None:
    snapshot = written(name, tmp_path)
    loader = home(name)
    assert loader.obstacle(snapshot) is None
    assert own_format(snapshot) == name
    assert [file.path for file in weight_files(snapshot)] == [loader.filename]
    loader.prepare(snapshot)
    assert difference(stored(TENSORS), stored(loader.load(snapshot, "cpu"))) is None
    assert difference(stored(TENSORS), loader.open(snapshot)) is None
    assert difference(stored(TENSORS), open_stored(snapshot)) is None


@pytest.mark.parametrize("name", loaders.names())
def test_a_loader_says_what_it_cannot_load(tmp_path: Path, name: str) -> None:
    for other in HOMES:
        snapshot = written(other, tmp_path / other)
        loader = loaders.get(name)()
        readable = other in loader.formats and name != "transformers"
        assert (loader.obstacle(snapshot) is None) is readable
        if not readable:
            with pytest.raises(UsageError, match=f"{name} (cannot load|needs)"):
                choose_loader(name, snapshot)


@pytest.mark.parametrize("name", HOMES)
def test_auto_is_the_home_of_the_models_own_format(tmp_path: Path, name: str) -> None:
    assert choose_loader("auto", written(name, tmp_path)).name == name


def test_safetensors_come_first(tmp_path: Path) -> None:
    for name in reversed(HOMES):
        snapshot = written(name, tmp_path)
    assert choose_loader("auto", snapshot).name == "safetensors"


def test_auto_is_our_own_for_safetensors_on_cuda(tmp_path: Path) -> None:
    assert choose_loader("auto", written("safetensors", tmp_path), "cuda:0").name == "pipelined"


def test_a_device_is_one_that_is_there() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda:0")
    with pytest.raises(UsageError, match="no device 'cuda:99'"):
        choose_device("cuda:99")


def test_a_difference_is_named() -> None:
    tensor = TENSORS["a.weight"]
    expected = stored({"a": tensor, "b": tensor})
    for actual, words in (
        ({"a": tensor}, "it lacks b"),
        ({"a": tensor, "b": tensor, "c": tensor}, "it adds c"),
        ({"a": tensor, "b": tensor.double()}, "b is float64 [4, 5], the model's is float32 [4, 5]"),
        ({"a": tensor, "b": tensor[:2]}, "b is float32 [2, 5], the model's is float32 [4, 5]"),
        ({"a": tensor, "b": -tensor}, "the bytes of b are not the model's"),
    ):
        assert difference(expected, stored(actual)) == words
    zero = torch.tensor([0.0, float("nan")])
    assert difference(stored({"a": zero}), stored({"a": zero.clone()})) is None
    assert difference(stored({"a": zero}), stored({"a": torch.tensor([-0.0, float("nan")])})) is not None


@pytest.mark.parametrize("name", HOMES)
def test_many_loads_leave_nothing(tmp_path: Path, name: str) -> None:
    snapshot, loader = written(name, tmp_path), home(name)

    def left() -> tuple[int, int, int]:
        maps = Path("/proc/self/maps").read_text().count("\n")
        return threading.active_count(), len(os.listdir("/proc/self/fd")), maps

    for _ in range(20):
        loader.load(snapshot, "cpu")
    threads, files, maps = left()
    for _ in range(200):
        loader.load(snapshot, "cpu")
    gc.collect()

    def nothing_more() -> bool:
        now = left()
        return now[0] <= threads and now[1] <= files and now[2] <= maps + 100  # threads map some

    wait_for(nothing_more)  # tensorizer's readers end a little after its load
