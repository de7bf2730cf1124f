"""The safetensors library, file by file, straight to the device."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from weightctl.checkpoint import Checkpoint, TensorEntry, read_checkpoint
from weightctl.config import Config
from weightctl.digests import unchanging
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.loaders.base import FormatLoader, convert, loaders, translated_read_errors
from weightctl.loaders.stored import Entry, Stored, as_bytes
from weightctl.model import Snapshot
from weightctl.progress import Task
from weightctl.storage import in_parallel, write_all

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip
"""safetensors' name of a dtype → torch's. Torch has no six-bit floats."""

READERS = 8


@loaders.register("safetensors")
class SafetensorsLoader(FormatLoader):
    """`safetensors.safe_open`."""

    summary = "the safetensors library, file by file"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "safetensors": "torch"}
    formats = ("safetensors",)
    filename = "model.safetensors"

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """On the CPU, with the backend mmap, the tensors are views of the mapped files."""
        return self.load_part(snapshot, device)

    def load_part(
        self,
        snapshot: Snapshot,
        device: str,
        names: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Raises UsageError for a backend that the installed library, or the device, has not."""
        from safetensors import SafetensorError

        wanted = [entry for entry in own_checkpoint(snapshot).tensors if names is None or entry.name in names]
        backend = Config.load().safetensors_backend
        if backend == "prefetch":
            _check_prefetch(device)
        tensors: dict[str, torch.Tensor] = {}
        for file, entries in itertools.groupby(wanted, key=lambda entry: entry.file):
            chosen = [described(entry).name for entry in entries]
            with translated_read_errors(file.source, SafetensorError):
                found = _loaded(file.source, chosen, device, backend)
                tensors.update(convert(found, dtypes))
        return tensors

    def open(self, snapshot: Snapshot) -> Stored:
        """Reads the files itself, so that it can judge what the library loads."""
        places = {entry.name: entry for entry in own_checkpoint(snapshot).tensors}

        def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
            return dict(zip(names, in_parallel(_read, [places[name] for name in names], READERS), strict=True))

        return Stored(tuple(described(entry) for entry in places.values()), read)

    def write(self, stored: Stored, path: Path, task: Task) -> None:
        """Tied tensors are written under each of their names: the format shares nothing."""
        names = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
        header, end = {}, 0
        for entry in stored.entries:
            dtype = names[str(entry.dtype).removeprefix("torch.")]
            shape = [*entry.shape[:-1], 2 * entry.shape[-1]] if dtype == "F4" else entry.shape
            header[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + entry.nbytes]}
            end += entry.nbytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb", buffering=0) as stream:
            write = write_all(stream)
            write(memoryview(len(encoded).to_bytes(8, "little") + encoded))
            for batch in stored.batches():
                tensors = stored.read([entry.name for entry in batch])
                for entry in batch:
                    write(as_bytes(tensors[entry.name]).numpy().data)
                    task.advance(entry.nbytes)


def _loaded(path: Path, names: Sequence[str], device: str, backend: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=device, backend="mmap" if backend == "prefetch" else backend) as shard:
        if backend == "prefetch":
            with shard.prefetch(dict.fromkeys(names)) as arriving:
                return dict(arriving)
        return {name: shard.get_tensor(name) for name in names}


def _check_prefetch(device: str) -> None:
    from safetensors import safe_open

    instead = "set safetensors_backend to mmap or pread"
    if not hasattr(safe_open, "prefetch"):
        raise UsageError(
            "this version of safetensors does not prefetch", f"pip install 'safetensors>=0.9', or {instead}"
        )
    if device == "cpu":
        raise UsageError("safetensors prefetches to CUDA devices only", instead)


def own_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """What lies in a model's safetensors files. Raises UsageError if it has none."""
    checkpoint = read_checkpoint(snapshot)
    if checkpoint.format != "safetensors":
        raise UsageError(f"no safetensors weights in {snapshot.root}", "choose another strategy, or auto")
    return checkpoint


@contextlib.contextmanager
def watched_checkpoint(snapshot: Snapshot) -> Iterator[Checkpoint]:
    """`own_checkpoint`, for a block that reads the files. Raises IntegrityError if they were written to meanwhile."""
    with contextlib.ExitStack() as files:
        files.enter_context(translated_os_errors(f"read {snapshot.root}"))
        for file in snapshot.files:
            if file.path.endswith(".safetensors"):
                files.enter_context(unchanging(file.source))
        yield own_checkpoint(snapshot)


def described(entry: TensorEntry) -> Entry:
    """As torch sees it. Raises UsageError for a dtype that torch has not."""
    import torch

    shape = entry.shape
    if entry.dtype not in TORCH_DTYPES:
        raise _unfit(entry, f"is {entry.dtype}, for which torch has no dtype")
    if entry.dtype == "F4":
        if shape[-1] % 2:
            raise _unfit(entry, f"has rows of {shape[-1]} F4, of which torch takes two together")
        shape = (*shape[:-1], shape[-1] // 2)
    return Entry(entry.name, getattr(torch, TORCH_DTYPES[entry.dtype]), shape, entry.nbytes)


def _unfit(entry: TensorEntry, reason: str) -> UsageError:
    where = f"{entry.file.source}: the tensor {entry.name[:200]!r}"
    return UsageError(f"{where} {reason}", "name the other tensors, to load those: tensors=[…]")


def _read(entry: TensorEntry) -> torch.Tensor:
    import torch

    tensor = described(entry)
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, done = data.numpy().data, 0
    with translated_os_errors(f"read {entry.file.source}"), entry.file.source.open("rb", buffering=0) as stream:
        while done < entry.nbytes:
            count = os.preadv(stream.fileno(), [view[done : done + (1 << 30)]], entry.offset + done)
            if not count:
                raise IntegrityError(f"{entry.file.source} became shorter while it was read", "fetch it again")
            done += count
    return data.view(tensor.dtype).reshape(tensor.shape)
