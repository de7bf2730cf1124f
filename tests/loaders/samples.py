"""Files of every dtype and shape, what the safetensors library reads from them, and where there is a GPU."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import strategies as st

from weightctl.checkpoint import DTYPE_BITS, TensorEntry, read_safetensors_header
from weightctl.loaders.lanes import CudaLane, SlabLane, StraightLane
from weightctl.loaders.safetensors import TORCH_DTYPES
from weightctl.loaders.stored import as_bytes
from weightctl.model import File

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
LANES = [
    pytest.param("cpu", StraightLane, id="straight"),
    pytest.param("cpu", SlabLane, id="slabs"),
    pytest.param("cuda", CudaLane, id="cuda", marks=gpu),
]

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


def mark(where: bytearray, start: int, count: int) -> None:
    assert not any(where[start : start + count])
    where[start : start + count] = b"\1" * count


def bytes_in_tensors() -> int:
    """Of all that live in this process."""
    gc.collect()
    return sum(thing.numel() * thing.element_size() for thing in gc.get_objects() if type(thing) is torch.Tensor)
