"""Every byte gets to its place, whatever the file looks like, and what goes wrong is said and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import weightctl
from tests.loaders.samples import DEVICES, LANES, Shapes, bytes_in_tensors, check, entries, models, sample, write
from weightctl.checkpoint import TensorEntry
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders.blocks import PAGE_BYTES, Shard, lay_out
from weightctl.loaders.lanes import CudaLane, Lane, StraightLane
from weightctl.loaders.pipelined import PipelinedLoader, Tuning, load_shards
from weightctl.loaders.stored import as_bytes
from weightctl.model import File
from weightctl.sources.directory import read_directory


@pytest.mark.parametrize(("device", "lane"), LANES)
@settings(max_examples=60, deadline=None)
@given(
    shards=models(),
    readers=st.integers(1, 4),
    pages=st.integers(2, 6),
    slabs=st.integers(1, 3),
)
def test_every_byte_is_the_files(
    device: str, lane: type[Lane], shards: list[tuple[Shapes, int]], readers: int, pages: int, slabs: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        first = itertools.accumulate((len(shapes) for shapes, _ in shards), initial=0)
        files = [
            write(Path(directory) / f"{number}.safetensors", shapes, padding, start)
            for number, ((shapes, padding), start) in enumerate(zip(shards, first, strict=False))
        ]
        tuning = Tuning(readers, pages * PAGE_BYTES, slabs)
        check(load_shards(lay_out(entries(files)), device, lane, tuning), files)


def test_a_thousand_shards(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n:04}.safetensors", [("F32", (n % 7, 3))], n % 8, n) for n in range(1000)]
    check(PipelinedLoader().load(read_directory(tmp_path), "cpu"), files)


@pytest.mark.parametrize("device", DEVICES)
def test_four_bit_floats(tmp_path: Path, device: str) -> None:
    file = write(tmp_path / "model.safetensors", [("U8", (1,)), ("F4", (3, 5))])
    tensor = PipelinedLoader().load(read_directory(tmp_path), device)["t1"]
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float4_e2m1fn_x2, (3, 5))
    assert bytes(as_bytes(tensor).cpu().numpy()) == file.source.read_bytes()[-15:]


@pytest.mark.parametrize("device", DEVICES)
def test_a_real_model(minilm: Path, device: str) -> None:
    snapshot = read_directory(minilm)
    tensors = PipelinedLoader().load(snapshot, device)
    check(tensors, [file for file in snapshot.files if file.path == "model.safetensors"])
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1


@pytest.mark.parametrize(("device", "lane"), LANES)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_conversion_on_the_way(tmp_path: Path, device: str, lane: type[Lane], target: torch.dtype) -> None:
    files = sample(tmp_path)
    there = entries(files)
    tuning = Tuning(2, 3 * PAGE_BYTES, 2)
    plain = load_shards(lay_out(there), device, lane, tuning)
    dtypes = {name: target for name, tensor in plain.items() if tensor.is_floating_point()}
    found = load_shards(lay_out(there, dtypes), device, lane, tuning)
    for name, tensor in plain.items():
        expected = tensor.to(dtypes.get(name, tensor.dtype))
        assert found[name].dtype == expected.dtype
        assert bytes(as_bytes(found[name]).cpu().numpy()) == bytes(as_bytes(expected).cpu().numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_conversion_takes_little_memory(tmp_path: Path) -> None:
    """What each reader converts in, in the segments of 20 MiB that torch takes, and no more after it."""
    file = write(tmp_path / "model.safetensors", [("F32", (1 << 20, 9)) for _ in range(8)])
    there = entries([file])
    tuning = Tuning.of(file.size, 128 << 20)
    shards = lay_out(there, {entry.name: torch.bfloat16 for entry in there})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    tensors = load_shards(shards, "cuda", CudaLane, tuning)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert torch.cuda.max_memory_reserved() - before <= nbytes + tuning.readers * tuning.block_bytes + (40 << 20)


@pytest.mark.parametrize("strategy", ["pipelined", "safetensors"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_a_model(tmp_path: Path, device: str, strategy: str) -> None:
    tensors = {f"layers.{n}.{part}": torch.randn(1000, 20) for n in range(5) for part in ("up", "down", "inv_freq")}
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = ["layers.3.*", "layers.0.up"]
    found = weightctl.load(tmp_path, device, strategy, tensors=wanted, dtype="float16")
    assert found.keys() == {"layers.3.up", "layers.3.down", "layers.3.inv_freq", "layers.0.up"}
    for name, tensor in found.items():
        kept = name.endswith("inv_freq")
        assert torch.equal(tensor.cpu(), tensors[name] if kept else tensors[name].half())
    with pytest.raises(UsageError, match=r"no tensor 'layers\.7\.\*'"):
        weightctl.load(tmp_path, device, strategy, tensors=["layers.7.*"])
    with pytest.raises(UsageError, match="float17"):
        weightctl.load(tmp_path, device, strategy, dtype="float17")


@pytest.mark.parametrize("nbytes", [0, 1, 10_000, 91 << 20, 1 << 30, 1 << 40])
@pytest.mark.parametrize("ring", [2 << 20, 16 << 20, 128 << 20, 1 << 30])
def test_a_ring_is_never_larger_than_asked_for(nbytes: int, ring: int) -> None:
    tuning = Tuning.of(nbytes, ring)
    assert tuning.readers * tuning.block_bytes * tuning.slabs <= ring
    assert tuning.block_bytes % PAGE_BYTES == 0
    assert tuning.slabs >= 2


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    mapped = len(Path("/proc/self/maps").read_text().splitlines())
    device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    host = bytes_in_tensors()
    yield
    assert bytes_in_tensors() <= host
    assert not set(threading.enumerate()) - threads
    assert len(os.listdir("/proc/self/fd")) <= files
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= mapped + 100  # threads map some, and that stays
    assert (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0) == device


def fails(shards: list[Shard], device: str, lane: type[Lane]) -> WeightctlError:
    with nothing_left():
        with pytest.raises(WeightctlError) as caught:
            load_shards(shards, device, lane, Tuning(3, 2 * PAGE_BYTES, 2))
        return caught.value


@pytest.mark.parametrize(("device", "lane"), LANES)
def test_a_file_that_shrinks(tmp_path: Path, device: str, lane: type[Lane]) -> None:
    files = sample(tmp_path)
    planned = lay_out(entries(files))
    os.truncate(files[1].source, files[1].size - 100)
    error = fails(planned, device, lane)
    assert isinstance(error, IntegrityError)
    assert error.message.startswith(f"{files[1].source} became shorter while it was read")


@pytest.mark.parametrize(("device", "lane"), LANES)
def test_a_file_that_goes(tmp_path: Path, device: str, lane: type[Lane]) -> None:
    files = sample(tmp_path)
    planned = lay_out(entries(files))
    files[1].source.unlink()
    assert f"cannot read {files[1].source}" in fails(planned, device, lane).message


@pytest.mark.parametrize(("device", "lane"), LANES)
def test_an_input_output_error(tmp_path: Path, device: str, lane: type[Lane]) -> None:
    """The kernel gives EIO for reading a process's memory where it has none."""
    files = sample(tmp_path)
    broken = [
        dataclasses.replace(shard, file=dataclasses.replace(shard.file, source=Path("/proc/self/mem")))
        for shard in lay_out(entries(files))
    ]
    error = fails(broken, device, lane)
    assert error.message.startswith("cannot read /proc/self/mem at byte ")
    assert error.message.endswith("Input/output error")


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    sample(tmp_path)
    snapshot = read_directory(tmp_path)
    over = threading.Event()

    def touch() -> None:
        for time in itertools.count():  # not the clock's, which is coarse
            os.utime(tmp_path / "model-1.safetensors", ns=(time, time))
            if over.is_set():
                return

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(IntegrityError, match=r"model-1\.safetensors changed while it was read"):
            [PipelinedLoader().load(snapshot, "cpu") for _ in range(100)]
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("device", DEVICES)
def test_more_than_there_is_memory(tmp_path: Path, device: str) -> None:
    """More than a process has addresses for, so that no kernel promises it."""
    size = 1 << 50
    file = File("model.safetensors", size, tmp_path / "model.safetensors")
    shards = lay_out([TensorEntry("huge", file, 0, size, "U8", (size,))])
    with pytest.raises(WeightctlError, match=rf"does not fit on {device}.*: {size} bytes are needed, \d+ are free"):
        load_shards(shards, device, StraightLane if device == "cpu" else CudaLane, Tuning(2, 1 << 40))


@pytest.mark.parametrize("device", DEVICES)
def test_many_loads_leave_nothing(tmp_path: Path, device: str) -> None:
    files = sample(tmp_path)
    snapshot = read_directory(tmp_path)
    PipelinedLoader().load(snapshot, device)
    with nothing_left():
        for _ in range(200):
            tensors = PipelinedLoader().load(snapshot, device)
        check(tensors, files)
        del tensors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_callers_stream_sees_the_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4_000_000)}, tmp_path / "model.safetensors")
    snapshot = read_directory(tmp_path)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            old = torch.full((4_000_000,), 7.0, device="cuda")
            torch.cuda._sleep(10_000_000)
            old.add_(1)
            del old  # its memory is the next buffer's, while it is still being written to
            found = PipelinedLoader().load(snapshot, "cuda")["a"]
            total = found.double().sum()
    expected = weightctl.load(tmp_path, "cpu")["a"].double().sum().item()
    assert total.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_another_device_than_the_present_one(tmp_path: Path) -> None:
    files = sample(tmp_path)
    tensors = PipelinedLoader().load(read_directory(tmp_path), "cuda:1")
    check(tensors, files)
    wide = weightctl.load(tmp_path, "cuda:1", "pipelined", dtype="float64")
    assert {str(tensor.device) for tensor in (*tensors.values(), *wide.values())} == {"cuda:1"}
    for name, tensor in tensors.items():
        assert torch.equal(as_bytes(wide[name]), as_bytes(tensor.to(wide[name].dtype)))
    assert torch.cuda.current_device() == 0
