"""Every byte gets to its place, whatever the file looks like, and what goes wrong is said and leaves nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import weightctl
from tests.disk import cannot, small_disk
from weightctl.checkpoint import DTYPE_BITS, TensorEntry, read_safetensors_header
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders import choose_loader
from weightctl.loaders.blocks import ALIGNMENT, GAP_BYTES, PAGE_BYTES, Piece, Shard, plan
from weightctl.loaders.lanes import CudaLane, Lane, Pinned, SlabLane, StraightLane, parse_cpus, pinned
from weightctl.loaders.pipelined import PipelinedLoader, Tuning, load_shards
from weightctl.loaders.reading import Reader, Source, is_cold
from weightctl.loaders.safetensors import TORCH_DTYPES
from weightctl.loaders.stored import as_bytes
from weightctl.model import File
from weightctl.sources.directory import read_directory

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
LANES = [
    pytest.param("cpu", StraightLane, id="straight"),
    pytest.param("cpu", SlabLane, id="slabs"),
    pytest.param("cuda", CudaLane, id="cuda", marks=gpu),
]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]

Shapes = list[tuple[str, tuple[int, ...]]]


def write(path: Path, shapes: Shapes, padding: int = 0, first: int = 0) -> File:
    """A file of random bytes with tensors t0, t1, … of these dtypes and shapes, in this order and without gaps."""
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(shapes, first):
        size = DTYPE_BITS[dtype] // 8
        shape = (*shape[:-1], 2 * shape[-1]) if dtype == "F4" and shape else shape
        nbytes = torch.Size(shape).numel() * size if size else torch.Size(shape).numel() // 2
        header[f"t{number}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    encoded = json.dumps(header).encode() + b" " * padding
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + os.urandom(end))
    return File(path.name, path.stat().st_size, path)


def entries(files: Sequence[File]) -> list[TensorEntry]:
    return [entry for file in files for entry in read_safetensors_header(file)]


def by_the_library(files: Sequence[File]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → dtype, shape and bytes, as the safetensors library reads them."""
    found = {}
    for file in files:
        for name, tensor in safetensors.deserialize(file.source.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def check(tensors: dict[str, torch.Tensor], files: Sequence[File]) -> None:
    expected = by_the_library(files)
    assert tensors.keys() == expected.keys()
    for name, (dtype, shape, data) in expected.items():
        tensor = tensors[name]
        shape = (*shape[:-1], shape[-1] // 2) if dtype in ("F4", "float4_e2m1fn_x2") else shape
        assert tensor.dtype == getattr(torch, TORCH_DTYPES[dtype])
        assert tuple(tensor.shape) == shape
        assert tensor.is_contiguous()
        assert bytes(as_bytes(tensor).cpu().numpy()) == data


def sample(directory: Path) -> list[File]:
    """Two shards of a few blocks each, misaligned in many ways."""
    shapes: Shapes = [("U8", (3,)), ("F32", (5000,)), ("BOOL", (1,)), ("BF16", (7, 1001)), ("F64", ()), ("F16", (0, 4))]
    return [
        write(directory / "model-1.safetensors", shapes, padding=3),
        write(directory / "model-2.safetensors", [("BF16", (4096, 9)), ("I64", (3,))], first=6),
    ]


@st.composite
def models(draw: st.DrawFn, longest: int = 20_000) -> list[tuple[Shapes, int]]:
    # F4 has two elements a byte, and only the newest libraries know it.
    dtype = st.sampled_from([name for name in TORCH_DTYPES if name != "F4"])
    shape = st.one_of(
        st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(0, longest).map(lambda size: (size,))
    )
    shard = st.tuples(st.lists(st.tuples(dtype, shape), max_size=8), st.integers(0, 9))
    return draw(st.lists(shard, min_size=1, max_size=5))


@pytest.mark.parametrize(("device", "lane"), LANES)
@settings(max_examples=100, deadline=None)
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
        planned = plan(entries(files), pages * PAGE_BYTES)
        check(load_shards(planned, device, lane, Tuning(readers, pages * PAGE_BYTES, slabs)), files)


@settings(max_examples=100, deadline=None)
@given(shards=models(), pages=st.integers(2, 6), wanted=st.sets(st.integers(0, 40)), cast=st.booleans())
def test_a_plan_reads_and_places_each_wanted_byte_once(
    shards: list[tuple[Shapes, int]], pages: int, wanted: set[int], cast: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = write(Path(directory) / "model.safetensors", shards[0][0], shards[0][1])
        there = {entry.name: entry for entry in entries([file]) if int(entry.name[1:]) in wanted}
        dtypes = {name: torch.float16 for name, entry in there.items() if cast and entry.dtype in ("F32", "F64")}
        for shard in plan(entries([file]), pages * PAGE_BYTES, there.keys(), dtypes):
            assert {tensor.name for tensor in shard.tensors} == there.keys()
            end = 0
            for tensor in shard.tensors:
                assert tensor.place % ALIGNMENT == 0
                assert tensor.place >= end
                end = tensor.place + tensor.nbytes
            assert end <= shard.nbytes < end + ALIGNMENT
            read = bytearray(file.size)
            written = bytearray(shard.nbytes)
            for block in shard.blocks:
                assert block.offset % PAGE_BYTES == 0
                assert block.nbytes <= pages * PAGE_BYTES
                assert block.nbytes == block.pieces[-1].end
                for piece in block.pieces:
                    mark(read, block.offset + piece.start, piece.nbytes)
                    mark(written, piece.place, arrived(piece))
            for entry in there.values():
                assert read[entry.offset : entry.offset + entry.nbytes] == b"\1" * entry.nbytes
            assert sum(read) == sum(entry.nbytes for entry in there.values())
            assert sum(written) == sum(tensor.nbytes for tensor in shard.tensors)


def arrived(piece: Piece) -> int:
    if piece.cast is None:
        return piece.nbytes
    assert piece.nbytes % piece.cast.source.itemsize == 0
    return piece.nbytes // piece.cast.source.itemsize * piece.cast.target.itemsize


def mark(where: bytearray, start: int, count: int) -> None:
    assert not any(where[start : start + count])
    where[start : start + count] = b"\1" * count


def test_a_file_without_oddities_is_copied_block_by_block(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", [("BF16", (4096, 64)), ("BF16", (128,)), ("F32", (4096, 8))])
    (shard,) = plan(entries([file]), 64 * PAGE_BYTES)
    assert [len(block.pieces) for block in shard.blocks] == [1] * len(shard.blocks)
    assert len(shard.blocks) == -(-file.size // (64 * PAGE_BYTES))


def test_a_thousand_shards(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n:04}.safetensors", [("F32", (n % 7, 3))], n % 8, n) for n in range(1000)]
    check(PipelinedLoader().load(read_directory(tmp_path), "cpu"), files)


@pytest.mark.parametrize("device", DEVICES)
def test_four_bit_floats(tmp_path: Path, device: str) -> None:
    file = write(tmp_path / "model.safetensors", [("U8", (1,)), ("F4", (3, 5))])
    tensor = PipelinedLoader().load(read_directory(tmp_path), device)["t1"]
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float4_e2m1fn_x2, (3, 5))
    assert bytes(as_bytes(tensor).cpu().numpy()) == file.source.read_bytes()[-15:]


@pytest.mark.parametrize("strategy", ["pipelined", "safetensors"])
def test_what_torch_cannot_hold(tmp_path: Path, strategy: str) -> None:
    """Three rows of F4 are whole bytes, of which the second holds a half of two rows."""
    for name, dtype, shape in (("odd", "F4", [2, 3]), ("six", "F6_E2M3", [2, 2])):
        header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 3]}}).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
        with pytest.raises(UsageError, match=r"of which torch takes two|torch has no dtype"):
            weightctl.load(tmp_path / name, "cpu", strategy)


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
    plain = load_shards(plan(there, 3 * PAGE_BYTES), device, lane, Tuning(2, 3 * PAGE_BYTES, 2))
    dtypes = {name: target for name, tensor in plain.items() if tensor.is_floating_point()}
    found = load_shards(plan(there, 3 * PAGE_BYTES, None, dtypes), device, lane, Tuning(2, 3 * PAGE_BYTES, 2))
    for name, tensor in plain.items():
        expected = tensor.to(dtypes.get(name, tensor.dtype))
        assert found[name].dtype == expected.dtype
        assert bytes(as_bytes(found[name]).cpu().numpy()) == bytes(as_bytes(expected).cpu().numpy())


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


def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    far = GAP_BYTES + 1
    file = write(
        tmp_path / "model.safetensors", [("U8", (9,)), ("U8", (far,)), ("U8", (9,)), ("U8", (far - 1,)), ("U8", (9,))]
    )
    (shard,) = plan(entries([file]), 64 * PAGE_BYTES, {"t0", "t2", "t4"})
    assert [len(block.pieces) for block in shard.blocks] == [1, 2]
    assert shard.nbytes == 3 * ALIGNMENT


def test_auto_takes_it_for_cuda(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    snapshot = read_directory(tmp_path)
    assert choose_loader("auto", snapshot, "cuda:0").name == "pipelined"
    assert choose_loader("auto", snapshot, "cpu").name == "safetensors"


@pytest.mark.parametrize("nbytes", [0, 1, 10_000, 91 << 20, 1 << 30, 1 << 40])
@pytest.mark.parametrize("ring", [2 << 20, 16 << 20, 128 << 20, 1 << 30])
def test_a_ring_is_never_larger_than_asked_for(nbytes: int, ring: int) -> None:
    tuning = Tuning.of(nbytes, ring)
    assert tuning.readers * tuning.block_bytes * tuning.slabs <= ring
    assert tuning.block_bytes % PAGE_BYTES == 0
    assert tuning.slabs >= 2


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def allows_direct_reads(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    drop_from_cache(path)
    return is_cold(path, path.stat().st_size)


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda", marks=gpu)])
def test_a_cold_file_is_read_past_the_page_cache(tmp_path: Path, device: str) -> None:
    file = write(tmp_path / "model.safetensors", [("U8", (5,)), ("F32", (3_000_001,)), ("U8", (4099,))])
    if not allows_direct_reads(file.source):
        cannot(f"{tmp_path} lies on a filesystem without O_DIRECT, or that keeps everything in memory")
    planned = plan(entries([file]), 1 << 20)
    drop_from_cache(file.source)
    tensors = load_shards(planned, device, SlabLane if device == "cpu" else CudaLane, Tuning(3, 1 << 20, 2))
    assert is_cold(file.source, file.size)
    check(tensors, [file])
    assert not is_cold(file.source, file.size)
    check(load_shards(planned, device, SlabLane if device == "cpu" else CudaLane, Tuning(3, 1 << 20, 2)), [file])


def test_a_file_in_memory_is_not_cold(tmp_path: Path) -> None:
    with small_disk(tmp_path / "memory", 8 << 20) as directory:
        file = write(directory / "model.safetensors", [("F32", (1_000_001,))])
        assert not is_cold(file.source, file.size)
        check(load_shards(plan(entries([file]), 1 << 20), "cpu", SlabLane, Tuning(2, 1 << 20, 2)), [file])


class Cold(Source):
    """One that is taken for cold without a look."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 0)
        self._direct = True


def read_all(path: Path, view: memoryview) -> bytes:
    with contextlib.closing(Reader()) as reader:
        size = len(path.read_bytes())
        reader.fill(Cold(path), view, 0, size)
        return bytes(view[:size])


def test_a_filesystem_that_refuses_to_open_directly(tmp_path: Path) -> None:
    path = Path("/proc/version")
    with pytest.raises(OSError, match="Invalid argument"):
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    assert read_all(path, memoryview(bytearray(PAGE_BYTES))) == path.read_bytes()


def test_a_filesystem_that_refuses_to_read_directly(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(100_001))
    assert read_all(path, memoryview(bytearray(100_002))[1:]) == path.read_bytes()


def open_files() -> list[str]:
    return sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name != "3")


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    mapped = len(Path("/proc/self/maps").read_text().splitlines())
    device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    yield
    assert not set(threading.enumerate()) - threads
    assert len(os.listdir("/proc/self/fd")) <= files
    assert len(Path("/proc/self/maps").read_text().splitlines()) <= mapped + 30
    assert (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0) == device


def fails(shards: list[Shard], device: str, lane: type[Lane]) -> WeightctlError:
    with nothing_left():
        with pytest.raises(WeightctlError) as caught:
            load_shards(shards, device, lane, Tuning(3, 2 * PAGE_BYTES, 2))
        return caught.value


@pytest.mark.parametrize(("device", "lane"), LANES)
def test_a_file_that_shrinks(tmp_path: Path, device: str, lane: type[Lane]) -> None:
    files = sample(tmp_path)
    planned = plan(entries(files), 2 * PAGE_BYTES)
    os.truncate(files[1].source, files[1].size - 100)
    error = fails(planned, device, lane)
    assert isinstance(error, IntegrityError)
    assert error.message.startswith(f"{files[1].source} became shorter while it was read")


@pytest.mark.parametrize(("device", "lane"), LANES)
def test_a_file_that_goes(tmp_path: Path, device: str, lane: type[Lane]) -> None:
    files = sample(tmp_path)
    planned = plan(entries(files), 2 * PAGE_BYTES)
    files[1].source.unlink()
    assert f"cannot read {files[1].source}" in fails(planned, device, lane).message


@pytest.mark.parametrize(("device", "lane"), LANES)
def test_an_input_output_error(tmp_path: Path, device: str, lane: type[Lane]) -> None:
    """The kernel gives EIO for reading a process's memory where it has none."""
    files = sample(tmp_path)
    broken = [
        Shard(Path("/proc/self/mem"), shard.file_bytes, shard.nbytes, shard.tensors, shard.blocks)
        for shard in plan(entries(files), 2 * PAGE_BYTES)
    ]
    error = fails(broken, device, lane)
    assert error.message.startswith("cannot read /proc/self/mem at byte ")
    assert error.message.endswith("Input/output error")


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    sample(tmp_path)
    snapshot = read_directory(tmp_path)
    over = threading.Event()

    def touch() -> None:
        while not over.is_set():
            os.utime(tmp_path / "model-1.safetensors")

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(IntegrityError, match=r"model-1\.safetensors changed while it was read"):
            [PipelinedLoader().load(snapshot, "cpu") for _ in range(100)]
    finally:
        over.set()
        thread.join()


def damaged(action: Callable[[Path], object], directory: Path) -> str:
    sample(directory)
    snapshot = read_directory(directory)
    action(directory / "model-2.safetensors")
    with pytest.raises(IntegrityError) as caught:
        PipelinedLoader().load(snapshot, "cpu")
    return caught.value.message


def test_a_damaged_file_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    for number, action in enumerate(
        [
            lambda path: os.truncate(path, path.stat().st_size - 1),
            lambda path: os.truncate(path, 4),
            lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
        ]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        assert "model-2.safetensors" in damaged(action, directory)


@pytest.mark.parametrize("device", DEVICES)
def test_more_than_there_is_memory(tmp_path: Path, device: str) -> None:
    """A sparse file of a few terabytes: its header is true, and no machine has the memory."""
    size = 8 << 40
    header = json.dumps({"huge": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    shards = plan(entries([File(path.name, 8 + len(header) + size, path)]), 1 << 30)
    with pytest.raises(WeightctlError, match=rf"does not fit on {device}.*: {size} bytes are needed, \d+ are free"):
        load_shards(shards, device, StraightLane if device == "cpu" else CudaLane, Tuning(2, 1 << 30))


@pytest.mark.parametrize("device", DEVICES)
def test_many_loads_leave_nothing(tmp_path: Path, device: str) -> None:
    files = sample(tmp_path)
    snapshot = read_directory(tmp_path)
    PipelinedLoader().load(snapshot, device)
    with nothing_left():
        for _ in range(50):
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


def test_processors_are_read_as_the_kernel_writes_them() -> None:
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("\n") == frozenset()


def test_the_peak_of_many_threads_is_counted() -> None:
    counted = Pinned()
    together = threading.Barrier(4)

    def hold(nbytes: int) -> None:
        for _ in range(1000):
            counted.add(nbytes)
            counted.add(-nbytes)
        counted.add(nbytes)
        together.wait()
        counted.add(-nbytes)

    threads = [threading.Thread(target=hold, args=(nbytes,)) for nbytes in (1, 2, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counted.now, counted.peak) == (0, 15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_pinned_memory_is_told(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", [("F32", (1 << 22,))])
    PipelinedLoader().load(read_directory(tmp_path), "cuda")
    assert pinned.now == 0
    assert PipelinedLoader().peak_pinned_bytes() >= PAGE_BYTES
