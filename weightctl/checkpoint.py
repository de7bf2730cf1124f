"""What lies in a model's weight files: indexes and headers, every number checked before it is used."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.model import File, Snapshot, check_path

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""

MAX_DIMENSIONS = 64
"""PyTorch's own limit."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Every dtype that the safetensors format defines → bits an element."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    file: File
    offset: int
    """Of its first byte, from the beginning of the file."""
    nbytes: int
    dtype: str
    """The safetensors name: BF16, F32, …"""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model: which files hold them, and for safetensors which tensor lies where."""

    format: str
    """`safetensors` or `torch` (pickled state dicts, whose tensors only torch can list)."""
    files: tuple[File, ...]
    tensors: tuple[TensorEntry, ...] = ()
    """Ordered by file, then by offset; empty for `torch`."""

    @property
    def bytes(self) -> int:
        """The size of the weight files together."""
        return sum(file.size for file in self.files)

    @property
    def paths(self) -> list[str]:
        """Of the weight files, as libraries take them."""
        return [str(file.source) for file in self.files]


def read_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """Find the weight files of a model and read their headers.

    safetensors wins over pickled files; an index file says which shards belong to the model, so that a stray
    duplicate beside them is not picked up. Raises UsageError if there are no weights, IntegrityError if an index
    names what is not there or a header lies.
    """
    files = _weight_files(snapshot, "model", ".safetensors")
    if files:
        tensors = [entry for file in files for entry in read_safetensors_header(file)]
        owners = _weight_map(snapshot, "model", ".safetensors")
        return Checkpoint("safetensors", tuple(files), tuple(_one_of_each(tensors, owners)))
    files = _weight_files(snapshot, "pytorch_model", ".bin") or _weight_files(snapshot, "", ".pt", ".pth")
    if files:
        return Checkpoint("torch", tuple(files))
    raise UsageError(
        f"no weights in {snapshot.root}", "weightctl reads the model directory's *.safetensors, *.bin, *.pt and *.pth"
    )


def _weight_files(snapshot: Snapshot, stem: str, *suffixes: str) -> list[File]:
    """The shards that the index names, or the one file of the usual name, or every top-level file so ending."""
    owners = _weight_map(snapshot, stem, suffixes[0])
    if owners:
        return [_shard(snapshot, name) for name in sorted(set(owners.values()))]
    if usual := snapshot.file(stem + suffixes[0]):
        return [usual]
    return [file for file in snapshot.files if "/" not in file.path and file.path.endswith(suffixes)]


def _shard(snapshot: Snapshot, name: str) -> File:
    if file := snapshot.file(check_path(name)):
        return file
    raise IntegrityError(
        f"the index of {snapshot.root} names {name[:200]!r}, which is not there",
        "pull the model again, with all its shards",
    )


def _weight_map(snapshot: Snapshot, stem: str, suffix: str) -> dict[str, str]:
    """Tensor name → shard, as the index file says; empty without one."""
    index = snapshot.file(f"{stem}{suffix}.index.json")
    if index is None:
        return {}
    if index.size > MAX_HEADER_BYTES:
        raise IntegrityError(f"{index.source} is too large for an index: {index.size} bytes")
    with translated_os_errors(f"read {index.source}"):
        content = _parse_json(index.source.read_bytes(), str(index.source))
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError(f"{index.source} has no weight_map", _DAMAGED)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise IntegrityError(f"{index.source}: the weight_map gives {name[:200]!r} no file name", _DAMAGED)
    return weight_map


def _one_of_each(tensors: Iterable[TensorEntry], owners: dict[str, str]) -> list[TensorEntry]:
    chosen: dict[str, TensorEntry] = {}
    for entry in tensors:
        other = chosen.get(entry.name)
        if other is None or owners.get(entry.name) == entry.file.path:
            chosen[entry.name] = entry
        elif owners.get(entry.name) != other.file.path:
            raise IntegrityError(
                f"two files hold the tensor {entry.name[:200]!r}: {other.file.path} and {entry.file.path}",
                "an index file (model.safetensors.index.json) says which shards belong to the model",
            )
    for name, shard in owners.items():
        if name not in chosen or chosen[name].file.path != shard:
            raise IntegrityError(
                f"the index says that {shard} holds the tensor {name[:200]!r}, which it does not",
                "pull the model again: its files are not of one revision",
            )
    return list(chosen.values())


def read_safetensors_header(file: File) -> list[TensorEntry]:
    """The tensors of one safetensors file, by offset. Raises IntegrityError if the header lies in any way."""
    path = file.source
    with translated_os_errors(f"read {path}"), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise IntegrityError(f"{path} is no safetensors file: it has {size} bytes", _DAMAGED)
        refuse_pointer(path, prefix)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise IntegrityError(f"{path}: its header claims {length} bytes, the file has {size}", _DAMAGED)
        header = _parse_json(stream.read(length), f"the header of {path}")
    start = 8 + length
    entries = [
        _entry(file, start, size - start, name, value) for name, value in header.items() if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end = start
    for entry in entries:
        if entry.offset != end:
            what = "overlaps the one before it" if entry.offset < end else "leaves a gap before it"
            raise IntegrityError(f"{path}: the tensor {entry.name[:200]!r} {what}", _DAMAGED)
        end += entry.nbytes
    if end != size:
        raise IntegrityError(f"{path} has {size} bytes, its header describes {end}", _DAMAGED)
    return entries


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise IntegrityError for what git leaves in the place of a large file, of which these are the first bytes."""
    if beginning.startswith(b"version "):
        raise IntegrityError(
            f"{path} is a Git LFS pointer, not the file itself", "fetch that: git lfs pull, or weightctl pull"
        )


_DAMAGED = "it is truncated or damaged: fetch it again"


def _entry(file: File, start: int, available: int, name: str, value: Any) -> TensorEntry:
    where = f"{file.source}: the tensor {name[:200]!r}"
    if not isinstance(value, dict):
        raise IntegrityError(f"{where} is not described by an object", _DAMAGED)
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise IntegrityError(f"{where} has the unknown dtype {reprlib.repr(dtype)}", _DAMAGED)
    if not is_shape(shape):
        raise IntegrityError(f"{where} has the impossible shape {reprlib.repr(shape)}", _DAMAGED)
    if not _naturals(offsets, 2) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise IntegrityError(f"{where} has offsets outside of the file: {reprlib.repr(offsets)}", _DAMAGED)
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BITS[dtype] != nbytes * 8:
        raise IntegrityError(
            f"{where} has {nbytes} bytes, which {dtype} of shape {reprlib.repr(shape)} has not", _DAMAGED
        )
    return TensorEntry(name, file, start + offsets[0], nbytes, dtype, tuple(shape))


def is_shape(value: object) -> TypeGuard[list[int]]:
    """Whether torch can make a tensor of that shape: one without elements has strides too, of 63 bits."""
    return _naturals(value, MAX_DIMENSIONS) and math.prod(max(length, 1) for length in value) < 1 << 63


def _naturals(value: object, most: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _parse_json(data: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise IntegrityError(f"{what} has the key {double[:200]!r} twice", _DAMAGED)
        return found

    try:
        value = json.loads(data.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{what} is not valid JSON: {error}", _DAMAGED) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{what} is not a JSON object", _DAMAGED)
    return value
