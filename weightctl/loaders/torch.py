"""torch.load of pickled state dicts: weights only, mapped where the file allows it."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from weightctl.checkpoint import Checkpoint, read_checkpoint, refuse_pointer
from weightctl.errors import IntegrityError, UsageError
from weightctl.loaders.base import SUFFIXES, FormatLoader, loaders, translated_read_errors
from weightctl.loaders.stored import Stored, stored
from weightctl.model import Snapshot
from weightctl.progress import Task

if TYPE_CHECKING:
    import torch


@loaders.register("torch")
class TorchLoader(FormatLoader):
    """`torch.load(…, mmap=True, weights_only=True)`."""

    summary = "torch.load, mapped, weights only"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "numpy": "torch"}
    formats = ("torch",)
    filename = "pytorch_model.bin"

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Tied tensors stay tied. On the CPU the tensors are views of the mapped files."""
        tensors: dict[str, torch.Tensor] = {}
        for file in _checkpoint(snapshot).files:
            found = _load(file.source, device)
            if double := found.keys() & tensors.keys():
                raise UsageError(
                    f"{file.path} and a file before it both hold the tensor {min(double)!r}",
                    "if they are different models, say which one is meant with --include",
                )
            tensors.update(found)
        return tensors

    def open(self, snapshot: Snapshot) -> Stored:
        """Mapped, so a tensor is read when it is used."""
        return stored(self.load(snapshot, "cpu"))

    def write(self, stored: Stored, path: Path, task: Task) -> None:
        """All tensors are in memory (or mapped) together: the format is one pickle."""
        import torch

        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in stored.read([entry.name for entry in stored.without(stored.ties).entries]).items():
            # A view would be saved with all of the memory that it is a view of.
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[name] = tensor if whole else tensor.clone()
        torch.save({entry.name: tensors[stored.ties.get(entry.name, entry.name)] for entry in stored.entries}, path)
        task.advance(stored.bytes)


def _checkpoint(snapshot: Snapshot) -> Checkpoint:
    others = [file for file in snapshot.files if not file.path.endswith(SUFFIXES["safetensors"])]
    return read_checkpoint(snapshot.replace_files(others))


def _load(path: Path, device: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        with translated_read_errors(path):
            with path.open("rb") as stream:
                beginning = stream.read(8)
            refuse_pointer(path, beginning)
            zipped = beginning.startswith(b"PK\3\4")
            content = torch.load(path, map_location=device, mmap=zipped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise IntegrityError(
            f"{path} is damaged, or holds more than tensors: it was not loaded, since its pickle could run any program",
            "get the model as safetensors, or convert it where you trust its author",
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a state dict", _WANTED)
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UsageError(f"{path} is no plain state dict: {name!r} is a {type(value).__name__}", _WANTED)
        if value.layout is not torch.strided or value.is_nested or value.is_meta:
            raise UsageError(f"{path} is no plain state dict: {name!r} is sparse, nested or without bytes", _WANTED)
    if zipped:
        _check_records(path, content.values())
    return {name: value.detach().resolve_conj().resolve_neg() for name, value in content.items()}


def _check_records(path: Path, tensors: Iterable[torch.Tensor]) -> None:
    """Raise IntegrityError unless the file has a record for each storage, of its size.

    torch takes the pickle's word for that, and maps what follows in the file.
    """
    with translated_read_errors(path, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        items = [item for item in archive.infolist() if PurePosixPath(item.filename).parent.name == "data"]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    if Counter(filter(None, storages.values())) - Counter(item.file_size for item in items):
        raise IntegrityError(f"{path}: its records are not those that its pickle describes", "fetch it again")


_WANTED = "weightctl reads a dict of names and dense tensors, as model.state_dict() gives"
