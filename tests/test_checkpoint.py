"""Headers and indexes, honest and lying: every tensor is found, and every lie is an IntegrityError."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightctl.checkpoint import DTYPE_BITS, MAX_HEADER_BYTES, read_checkpoint, read_safetensors_header
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.model import File, Reference, Snapshot
from weightctl.progress import Progress
from weightctl.sources.directory import DirectorySource

WRITABLE = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""Every dtype of torch that the safetensors library writes → its name in the format."""


def snapshot(directory: Path) -> Snapshot:
    reference = Reference("directory", str(directory))
    return DirectorySource().plan(reference, config=Config(), progress=Progress()).snapshot


def as_file(path: Path) -> File:
    return File(path.name, path.stat().st_size, path)


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    return raw(json.dumps(tensors).encode(), data)


def tensor(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def read(path: Path, content: bytes) -> list[Any]:
    path.write_bytes(content)
    return read_safetensors_header(as_file(path))


# Honest files


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → dtype, shape and bytes of each tensor of a file."""
    found = {}
    for name in draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), unique=True, max_size=5)):
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(WRITABLE)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        count = 1
        for length in shape:
            count *= length
        nbytes = count * DTYPE_BITS[WRITABLE[dtype]] // 8
        found[name] = (dtype, shape, draw(st.binary(min_size=nbytes, max_size=nbytes)))
    return found


@settings(max_examples=60, deadline=None)
@given(tensors(), st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), min_size=1, max_size=2))
def test_what_the_safetensors_library_writes_is_read_back(
    written: dict[str, tuple[str, tuple[int, ...], bytes]], metadata: dict[str, str] | None
) -> None:
    import torch
    from safetensors.torch import save

    def as_tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(getattr(torch, dtype)).reshape(shape)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.safetensors"
        path.write_bytes(save({name: as_tensor(*parts) for name, parts in written.items()}, metadata))
        content, entries = path.read_bytes(), read_safetensors_header(as_file(path))
    found = {
        entry.name: (entry.dtype, entry.shape, content[entry.offset : entry.offset + entry.nbytes]) for entry in entries
    }
    assert found == {name: (WRITABLE[d], shape, data) for name, (d, shape, data) in written.items()}
    assert [entry.offset for entry in entries] == sorted(entry.offset for entry in entries)


def test_a_real_model(minilm: Path) -> None:
    from safetensors import safe_open

    checkpoint = read_checkpoint(snapshot(minilm))
    assert checkpoint.format == "safetensors"
    assert checkpoint.bytes == (minilm / "model.safetensors").stat().st_size
    with safe_open(minilm / "model.safetensors", framework="pt") as library:
        assert {entry.name: list(entry.shape) for entry in checkpoint.tensors} == {
            name: library.get_slice(name).get_shape()
            for name in library.keys()  # noqa: SIM118
        }


def test_one_tensor_of_no_bytes(tmp_path: Path) -> None:
    (entry,) = read(tmp_path / "model.safetensors", described({"empty": tensor(0, 0, [0, 5])}))
    assert (entry.nbytes, entry.shape) == (0, (0, 5))


def test_a_scalar_and_a_file_without_tensors(tmp_path: Path) -> None:
    (entry,) = read(tmp_path / "a.safetensors", described({"x": tensor(0, 4, [], "F32")}, bytes(4)))
    assert entry.shape == ()
    assert read(tmp_path / "b.safetensors", described({"__metadata__": {"format": "pt"}})) == []


def test_packed_dtypes_take_part_of_a_byte(tmp_path: Path) -> None:
    (entry,) = read(tmp_path / "model.safetensors", described({"x": tensor(0, 3, [2, 3], "F4")}, bytes(3)))
    assert entry.nbytes == 3
    with pytest.raises(IntegrityError):
        read(tmp_path / "model.safetensors", described({"x": tensor(0, 3, [5], "F4")}, bytes(3)))


# Lies

LIES = {
    "nothing": b"",
    "less than a length": b"1234567",
    "no header": raw(b""),
    "a header longer than the file": raw(b"{}", length=3),
    "a terabyte header": raw(b"{}", length=1 << 40),
    "the largest header": raw(b"{}", length=(1 << 64) - 1),
    "no JSON": raw(b"not json"),
    "no object": raw(b"[]"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "deep nesting": raw(b'{"x":' + b"[" * 100_000),
    "deep nesting of objects": raw(b'{"x":' * 100_000),
    "duplicate keys": raw(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":1}', b"1"),
    "duplicate keys within a tensor": raw(b'{"x":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "a tensor that is no object": described({"x": [0, 1]}, b"1"),
    "no dtype": described({"x": {"shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "an unknown dtype": described({"x": tensor(0, 1, dtype="U9")}, b"1"),
    "a dtype that is no text": described({"x": {**tensor(0, 1), "dtype": ["U8"]}}, b"1"),
    "no shape": described({"x": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"),
    "a shape that is no list": described({"x": {**tensor(0, 1), "shape": 1}}, b"1"),
    "a negative shape": described({"x": tensor(0, 1, [-1, -1])}, b"1"),
    "a fractional shape": described({"x": {**tensor(0, 1), "shape": [1.0]}}, b"1"),
    "a shape of booleans": described({"x": {**tensor(0, 1), "shape": [True]}}, b"1"),
    "a shape of many dimensions": described({"x": tensor(0, 1, [1] * 100_000)}, b"1"),
    "a shape whose product overflows": described({"x": tensor(0, 0, [1 << 32, 1 << 32])}),
    "a shape whose strides overflow": described({"x": tensor(0, 0, [0, 1 << 32, 1 << 32])}),
    "no offsets": described({"x": {"dtype": "U8", "shape": [1]}}, b"1"),
    "one offset": described({"x": {**tensor(0, 1), "data_offsets": [0]}}, b"1"),
    "three offsets": described({"x": {**tensor(0, 1), "data_offsets": [0, 1, 1]}}, b"1"),
    "a negative offset": described({"x": tensor(-1, 0)}, b"1"),
    "offsets in the wrong order": described({"x": {**tensor(0, 1), "data_offsets": [1, 0]}}, b"1"),
    "an offset beyond the file": described({"x": tensor(0, 2)}, b"1"),
    "an offset beyond any file": described({"x": tensor(0, 1 << 62)}, b"1"),
    "an offset of booleans": described({"x": {**tensor(0, 1), "data_offsets": [False, True]}}, b"1"),
    "an offset that is not finite": raw(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}', b"1"),
    "an offset of 100000 digits": raw(
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,%s]}}' % (b"9" * 100_000), b"1"
    ),
    "overlapping tensors": described({"x": tensor(0, 2), "y": tensor(1, 3)}, b"123"),
    "one tensor twice": described({"x": tensor(0, 2), "y": tensor(0, 2)}, b"12"),
    "a gap at the beginning": described({"x": tensor(1, 2)}, b"12"),
    "a gap between tensors": described({"x": tensor(0, 1), "y": tensor(2, 3)}, b"123"),
    "bytes at the end that nobody describes": described({"x": tensor(0, 1)}, b"12"),
    "a truncated file": described({"x": tensor(0, 4)}, b"123"),
    "fewer bytes than the shape takes": described({"x": tensor(0, 7, [2], "F32")}, bytes(7)),
    "more bytes than the shape takes": described({"x": tensor(0, 9, [2], "F32")}, bytes(9)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(IntegrityError) as caught:
        read(path, LIES[lie])
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.message
    assert len(caught.value.message) < 2000


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_nesting_of_any_depth_is_no_traceback(tmp_path: Path, key: str) -> None:
    for depth in (10, 500, *range(850, 1000, 3), 5000, 50_000):
        nested = b"[" * depth + b"]" * depth
        with pytest.raises(IntegrityError):
            read(
                tmp_path / "model.safetensors", raw(b'{"x":{"dtype":"U8","shape":[],"%s":%s}}' % (key.encode(), nested))
            )


@pytest.mark.parametrize("header", [{"x" * 5_000_000: 1}, {"x": tensor(0, 1, dtype="U" * 5_000_000)}])
def test_the_message_is_short_however_long_the_lie(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError) as caught:
        read(tmp_path / "model.safetensors", described(header, b"1"))
    assert len(caught.value.message) < 2000


def test_a_terabyte_header_in_a_sparse_terabyte_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 40))
        stream.truncate((1 << 40) + 8)
    with pytest.raises(IntegrityError, match="its header claims"):
        read_safetensors_header(as_file(path))


def test_a_header_just_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        stream.truncate(MAX_HEADER_BYTES + 9)
    with pytest.raises(IntegrityError, match="its header claims"):
        read_safetensors_header(as_file(path))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightctlError, match="No such file"):
        read_safetensors_header(File("x", 1, tmp_path / "x"))


HONEST = described(
    {"__metadata__": {"format": "pt"}, "a": tensor(0, 4, [2], "F16"), "b": tensor(4, 8, [1, 1], "F32")}, bytes(8)
)


def read_quietly(content: bytes) -> list[Any] | None:
    """The entries, or None for an error that a user can read; any other exception fails the test."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            return read(Path(directory) / "model.safetensors", content)
        except (IntegrityError, UsageError):
            return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_damage_to_a_file_is_noticed_or_harmless(data: st.DataObject) -> None:
    content = bytearray(HONEST)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        until = at + data.draw(st.integers(0, 3))
        content[at:until] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"-", b'"', b"[", b"}", b"9", b"\\ud800"])
        )
    for entry in read_quietly(bytes(content)) or ():
        assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(content)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["U8", "F4", "BF16"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), json_values, max_size=3), st.binary(max_size=8))
def test_any_json_in_a_header_is_read_or_refused(header: dict[str, Any], data: bytes) -> None:
    read_quietly(described(header, data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    read_quietly(content)


# Which files belong to the model

ONE = {"a": tensor(0, 1)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of two shards, an index, and a stray duplicate of both beside them."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model-00001-of-00002.safetensors").write_bytes(described({"a": tensor(0, 1)}, b"1"))
    (model / "model-00002-of-00002.safetensors").write_bytes(described({"b": tensor(0, 2)}, b"22"))
    (model / "consolidated.safetensors").write_bytes(described({"a": tensor(0, 1), "b": tensor(1, 3)}, b"122"))
    write_index(model, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return model


def write_index(model: Path, weight_map: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_index_says_which_shards_belong_to_the_model(directory: Path) -> None:
    checkpoint = read_checkpoint(snapshot(directory))
    assert [file.path for file in checkpoint.files] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    ]  # fmt: skip
    assert {entry.name: entry.nbytes for entry in checkpoint.tensors} == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-00003-of-00002.safetensors"}, "names 'model-00003-of-00002.safetensors', which is not there"),
        ({"a": "../model.safetensors"}, "leads outside"),
        ({"a": "/etc/passwd"}, "leads outside"),
        ({"a": ""}, "leads outside"),
        ({"a": 1}, "no file name"),
        ({"a": None}, "no file name"),
        ({"a": ["model-00001-of-00002.safetensors"]}, "no file name"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ("model-00001-of-00002.safetensors", "no weight_map"),
        ({"a": "config.json"}, "safetensors file|header"),
        ({"z": "model-00001-of-00002.safetensors"}, "which it does not"),
        ({"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}, "which it does not"),
    ],
)
def test_an_index_that_lies(directory: Path, weight_map: object, message: str) -> None:
    write_index(directory, weight_map)
    with pytest.raises(IntegrityError, match=message):
        read_checkpoint(snapshot(directory))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, b'{"weight_map":{"a":"x","a":"y"}}'])
def test_an_index_that_is_none(directory: Path, content: bytes) -> None:
    (directory / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors\.index\.json"):
        read_checkpoint(snapshot(directory))


def test_an_index_of_a_terabyte_is_not_read(directory: Path) -> None:
    with (directory / "model.safetensors.index.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(IntegrityError, match="too large for an index"):
        read_checkpoint(snapshot(directory))


def test_a_truncated_shard(directory: Path) -> None:
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="model-00002-of-00002"):
        read_checkpoint(snapshot(directory))


def test_two_files_with_one_tensor_need_an_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(IntegrityError, match="two files hold the tensor 'a'"):
        read_checkpoint(snapshot(directory))


def test_a_tensor_in_two_shards_belongs_to_the_one_that_the_index_names(directory: Path) -> None:
    (directory / "model-00001-of-00002.safetensors").write_bytes(
        described({"a": tensor(0, 1), "b": tensor(1, 2)}, b"11")
    )
    entries = {entry.name: entry for entry in read_checkpoint(snapshot(directory)).tensors}
    assert entries["b"].file.path == "model-00002-of-00002.safetensors"


def test_the_usual_name_wins_over_strays(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(described(ONE, b"1"))
    (tmp_path / "consolidated.safetensors").write_bytes(described(ONE, b"1"))
    assert [file.path for file in read_checkpoint(snapshot(tmp_path)).files] == ["model.safetensors"]


def test_any_one_file_will_do_without_the_usual_name(tmp_path: Path) -> None:
    (tmp_path / "weights of ünknown name.safetensors").write_bytes(described(ONE, b"1"))
    assert len(read_checkpoint(snapshot(tmp_path)).tensors) == 1


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["full.pth"], ["a.pt", "b.pth"]])
def test_pickled_files_are_listed_but_not_opened(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"not a pickle")
    checkpoint = read_checkpoint(snapshot(tmp_path))
    assert checkpoint.format == "torch"
    assert [file.path for file in checkpoint.files] == names
    assert checkpoint.tensors == ()


def test_shards_of_pickled_files_follow_their_index(tmp_path: Path) -> None:
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin", "training_args.bin"):
        (tmp_path / name).touch()
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert [file.path for file in read_checkpoint(snapshot(tmp_path)).files] == [
        "pytorch_model-1.bin",
        "pytorch_model-2.bin",
    ]


def test_safetensors_wins_over_pickled_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(described(ONE, b"1"))
    (tmp_path / "pytorch_model.bin").touch()
    assert read_checkpoint(snapshot(tmp_path)).format == "safetensors"


def test_a_model_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no weights in"):
        read_checkpoint(snapshot(tmp_path))
