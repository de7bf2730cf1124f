"""Tensorizer files (*.tensors), read and written with the tensorizer library."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weightctl.checkpoint import is_shape
from weightctl.config import Config
from weightctl.digests import Check
from weightctl.errors import IntegrityError, NotInstalledError, UsageError, translated_os_errors
from weightctl.loaders.base import FormatLoader, convert, loaders, translated_read_errors
from weightctl.loaders.stored import Entry, Stored
from weightctl.model import Snapshot
from weightctl.progress import Progress, Task

if TYPE_CHECKING:
    import torch

EXTRAS = "__weightctl__"
"""A tensor of JSON for what the format has no place for, in files that need it: `ties`, name → the name whose bytes it
shares, and `empty`, name → dtype and shape of a tensor without elements (not all can be read)."""

MAGIC = b"|TZR|"
HEADER = struct.Struct("<5sI32sQ8xQQ")
"""Magic, version, flags, tensor bytes, tensor count, index bytes: how every tensorizer file begins."""

ENCRYPTED = 1
"""The flag of files whose tensors are encrypted. Their names, dtypes and shapes are not."""

KEY_BYTES = 32

INDEX_BYTES = 256 * 1024
"""What the library reserves for the index: enough for some 3000 tensors."""


@loaders.register("tensorizer")
class TensorizerLoader(FormatLoader):
    """`tensorizer.TensorDeserializer`, with the readers and the key that the configuration gives it."""

    summary = "the tensorizer library, from a *.tensors file"
    requires: ClassVar[Mapping[str, str]] = {"torch": "tensorizer", "tensorizer": "tensorizer"}
    formats = ("tensorizer",)
    filename = "model.tensors"

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Tied tensors are one tensor under several names."""
        return self.load_part(snapshot, device)

    def load_part(
        self,
        snapshot: Snapshot,
        device: str,
        names: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Reads no more than it must. Converted tied tensors are no longer tied."""
        stored = self._open(_file(snapshot), device)
        wanted = [entry.name for entry in stored.entries if names is None or entry.name in names]
        return convert(stored.read(wanted), dtypes)

    def open(self, snapshot: Snapshot) -> Stored:
        """Each read opens the file anew: the library keeps what it has once read."""
        return self._open(_file(snapshot), "cpu")

    def write(self, stored: Stored, path: Path, task: Task) -> None:
        """A batch at a time, encrypted if the configuration has a key. Raises UsageError for what the format cannot
        hold.
        """
        import torch
        from tensorizer import EncryptionParams, TensorSerializer

        written = stored.without({*stored.ties, *(entry.name for entry in stored.entries if not entry.nbytes)})
        key = _key()
        try:
            serializer = TensorSerializer(path, encryption=EncryptionParams(key) if key else None)
            try:
                _reserve_index(serializer, written)
                for batch in written.batches():
                    tensors = stored.read([entry.name for entry in batch])
                    if key:  # which is done in place
                        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                    serializer.write_state_dict(tensors)
                    task.advance(sum(entry.nbytes for entry in batch))
                if len(written.entries) < len(stored.entries):
                    extras = bytearray(_encoded_extras(stored))
                    serializer.write_state_dict({EXTRAS: torch.frombuffer(extras, dtype=torch.uint8)})
            finally:
                serializer.close()
        except (ValueError, NotImplementedError, struct.error) as error:
            raise UsageError(f"the Tensorizer format cannot hold this model: {error}") from error

    def _open(self, path: Path, device: str) -> Stored:
        import torch

        entries = _entries(path)
        ties: dict[str, str] = {}
        empty: dict[str, Entry] = {}
        if entries.pop(EXTRAS, None):
            ties, empty = _extras(path, set(entries))
            entries.update(empty)
            entries.update((name, dataclasses.replace(entries[first], name=name)) for name, first in ties.items())

        def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
            tensors = _read(path, {ties.get(name, name) for name in names} - empty.keys(), device)
            for entry in empty.values():
                tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
            return {name: tensors[ties.get(name, name)] for name in names}

        return Stored(tuple(entries.values()), read, ties)


def _file(snapshot: Snapshot) -> Path:
    files = [file for file in snapshot.files if "/" not in file.path and file.path.endswith(".tensors")]
    if len(files) != 1:
        names = ", ".join(file.path for file in files) or "none"
        raise UsageError(f"one *.tensors file makes a model, {snapshot.root} has {names}", "choose it with --include")
    return files[0].source


def _entries(path: Path) -> dict[str, Entry]:
    """The index of a file, every number in it checked: the library itself believes them all."""
    import numpy
    import torch
    from tensorizer import CryptographyError

    with translated_read_errors(path, CryptographyError):
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise IntegrityError(f"{path} is no Tensorizer file", "weightctl serialize makes one")
        if len(header) < HEADER.size:
            raise IntegrityError(f"{path} ends within its header", _TRUNCATED)
        *_, index_bytes = HEADER.unpack(header)
        if index_bytes > size:
            raise IntegrityError(f"{path}: its index claims {index_bytes} bytes, the file has {size}", _TRUNCATED)
        entries: dict[str, Entry] = {}
        with _deserializer(path, device="cpu", lazy_load=True) as file:
            for key, item in file._metadata.items():  # no public name tells where a tensor lies
                name = key.normalize_()
                if not isinstance(name, str):
                    raise UsageError(f"{path} holds a nested structure, not a state dict")
                where = f"{path}: the tensor {name[:200]!r}"
                numpy_name, _, torch_name = item.dtype.partition("\0torch.")
                sample = numpy.empty(0, numpy_name if not torch_name else "u1")
                dtype = getattr(torch, torch_name) if torch_name else torch.from_numpy(sample).dtype
                if math.prod(map(int, item.shape)) * dtype.itemsize != item.data_length:
                    raise IntegrityError(f"{where} has {item.data_length} bytes, its shape has not", _TRUNCATED)
                if not HEADER.size < item.offset < item.data_offset <= size - item.data_length:
                    raise IntegrityError(f"{where} lies outside of the file", _TRUNCATED)
                entries[name] = Entry(name, dtype, tuple(item.shape), item.data_length)
        return entries


_TRUNCATED = "the file is truncated or damaged: serialize the model again"


def _read(path: Path, names: Collection[str], device: str, *, verify: bool = False) -> dict[str, torch.Tensor]:
    from tensorizer import CryptographyError
    from tensorizer.serialization import HashMismatchError

    wanted = set(names)
    if not wanted:
        return {}
    try:
        with (
            translated_read_errors(path, HashMismatchError),
            _deserializer(
                path, device=device, filter_func=wanted.__contains__, verify_hash=verify,
                num_readers=Config.load().tensorizer_readers,
            ) as file,
        ):  # fmt: skip
            return {name: file[name].detach() for name in wanted}
    except CryptographyError as error:
        raise IntegrityError(
            f"{path} cannot be decrypted: it was encrypted with another key, or is damaged", "check tensorizer_key"
        ) from error


def _deserializer(path: Path, **options: Any) -> Any:
    """The library's own, with the key if the file is encrypted. Raises UsageError if there is none."""
    from tensorizer import DecryptionParams, TensorDeserializer

    with path.open("rb") as stream:
        _, version, flags, *_ = HEADER.unpack(stream.read(HEADER.size))
    if version == 3 or flags[0] & ENCRYPTED:
        if (key := _key()) is None:
            raise UsageError(
                f"{path} is encrypted", "set tensorizer_key (WEIGHTCTL_TENSORIZER_KEY) to the file that holds its key"
            )
        options["encryption"] = DecryptionParams.from_key(key)
    return TensorDeserializer(path, **options)


def _key() -> bytes | None:
    """What is in the file that the configuration names: no argument and no variable ever holds it."""
    path = Config.load().tensorizer_key
    if path is None:
        return None
    from tensorizer._crypt import available

    if not available:
        raise NotInstalledError("an encrypted file", "libsodium", "tensorizer")
    with translated_os_errors(f"read {path}"), path.open("rb") as stream:
        key = stream.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise UsageError(f"{path} is no key of {KEY_BYTES} bytes", f"make one: head -c {KEY_BYTES} /dev/urandom >FILE")
    return key


def check_tensorizer(path: Path, *, progress: Progress) -> Check:
    """Read every tensor of a file and compare it with the hashes that are kept beside it."""
    TensorizerLoader.require()
    with translated_os_errors(f"read {path}"):
        size = path.stat().st_size
    try:
        entries = _entries(path)
    except IntegrityError as error:
        return Check(1, size, (error.message,))
    problems = []
    with progress.task(f"verifying {path.name}", sum(entry.nbytes for entry in entries.values())) as task:
        for entry in entries.values():
            try:
                _read(path, [entry.name], "cpu", verify=True)
            except IntegrityError:
                problems.append(f"the tensor {entry.name} is damaged: its bytes are not those that were written")
            task.advance(entry.nbytes)
    return Check(1, size, tuple(problems))


def _encoded_extras(stored: Stored) -> bytes:
    empty = {e.name: [str(e.dtype).removeprefix("torch."), e.shape] for e in stored.entries if not e.nbytes}
    return json.dumps({"ties": dict(stored.ties), "empty": empty}).encode()


def _extras(path: Path, names: set[str]) -> tuple[dict[str, str], dict[str, Entry]]:
    """The ties and the tensors without elements. Raises IntegrityError for what `_encoded_extras` would not write."""
    import torch

    with translated_read_errors(path):
        extras: Any = json.loads(_read(path, [EXTRAS], "cpu")[EXTRAS].numpy().tobytes())
        ties, empty = dict(extras["ties"]), {}
        for name, (dtype, shape) in extras["empty"].items():
            empty[name] = Entry(name, torch.empty(0, dtype=getattr(torch, dtype)).dtype, tuple(shape), 0)
            if not is_shape(shape) or 0 not in shape:
                raise ValueError(f"{name!r} is not empty")
        if names & (ties.keys() | empty.keys()) or ties.keys() & empty.keys() or not names >= set(ties.values()):
            raise ValueError("its tied or empty tensors are others at the same time")
        return ties, empty


def _reserve_index(serializer: Any, stored: Stored) -> None:
    """Make room for the index of a model of many tensors: readers take any size, only this writer's is fixed."""
    needed = sum(len(entry.name.encode()) + 8 * len(entry.shape) + 128 for entry in stored.entries) + 1024
    if needed <= INDEX_BYTES:
        return
    start = serializer._metadata_loc
    serializer._file.seek(start - 8)
    serializer._file.write(struct.pack("<Q", needed) + bytes(needed))
    serializer._file.flush()
    serializer._metadata_end = start + needed
