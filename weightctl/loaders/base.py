"""What a load strategy has to do: bring a model's weights onto a device."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.errors import IntegrityError, NotInstalledError, UsageError, WeightctlError, translated_os_errors
from weightctl.model import File, Snapshot
from weightctl.progress import Task
from weightctl.registry import Backend, Registry

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from weightctl.loaders.stored import Stored

SUFFIXES = {
    "safetensors": (".safetensors", ".safetensors.index.json"),
    "torch": (".bin", ".pt", ".pth", ".bin.index.json"),
    "tensorizer": (".tensors",),
}
"""Weight format → how the names of its files end. Where a model has several formats, the first is the model's own."""


def formats(snapshot: Snapshot) -> tuple[str, ...]:
    """The formats in which a model holds weights, its own first."""
    names = [file.path for file in snapshot.files if "/" not in file.path]
    return tuple(format for format, suffixes in SUFFIXES.items() if any(name.endswith(suffixes) for name in names))


def own_format(snapshot: Snapshot) -> str:
    """The model's own format. Raises UsageError if it has no weights."""
    if found := formats(snapshot):
        return found[0]
    endings = ", ".join(f"*{suffix}" for some in SUFFIXES.values() for suffix in some if not suffix.endswith(".json"))
    raise UsageError(f"no weights in {snapshot.root}", f"weightctl reads {endings} in the model's directory")


def weight_files(snapshot: Snapshot) -> list[File]:
    """The files that hold weights, in any of the formats."""
    suffixes = tuple(suffix for some in SUFFIXES.values() for suffix in some if not suffix.endswith(".json"))
    return [file for file in snapshot.files if file.path.endswith(suffixes)]


class Loader(Backend, ABC):
    """One way to load weights."""

    formats: ClassVar[tuple[str, ...]]
    """The weight formats it reads: `safetensors`, `torch`, `tensorizer`."""

    def obstacle(self, snapshot: Snapshot) -> str | None:
        """Why it cannot load this model, or None if it can. Opens no file."""
        if set(self.formats) & set(formats(snapshot)):
            return None
        return f"the model has no {' or '.join(self.formats)} weights"

    def prepare(self, snapshot: Snapshot) -> None:  # noqa: ARG002
        """Import everything that `load` needs, so that a clock can start after it."""
        for module in self.requires:
            importlib.import_module(module)

    def peak_pinned_bytes(self) -> int:
        """The most host memory that this process had pinned at once for such loads, without torch's allocator."""
        return 0

    @abstractmethod
    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Every tensor of the model by name, on `device` (`cpu` or `cuda:N`), ready for use on return.

        Raises UsageError if the model holds none of `formats`, IntegrityError if its files are damaged.
        """

    def load_part(
        self,
        snapshot: Snapshot,
        device: str,
        names: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors called `names` (all, if None), those in `dtypes` converted, under their stored names.

        Unless a loader can do better, it loads all of them first.
        """
        found = self.as_stored(self.load(snapshot, device), snapshot)
        for name in [name for name in found if names is not None and name not in names]:
            del found[name]
        return convert(found, dtypes)

    def as_stored(self, tensors: dict[str, torch.Tensor], snapshot: Snapshot) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """What `load` returned, under the names that the model's files give: only a loader that renames differs."""
        return tensors


class FormatLoader(Loader):
    """The home of a weight format: what reads it also writes it."""

    filename: ClassVar[str]
    """What the format's file is usually called."""

    @abstractmethod
    def open(self, snapshot: Snapshot) -> Stored:
        """The model's tensors as its files hold them, not read yet. Raises as `load` does."""

    @abstractmethod
    def write(self, stored: Stored, path: Path, task: Task) -> None:
        """Write every tensor to the new file `path`, as few at a time as the format allows."""


def convert(tensors: dict[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] | None) -> dict[str, torch.Tensor]:
    """`tensors`, those named in `dtypes` replaced one by one, so that no more than one is there twice."""
    for name, dtype in (dtypes or {}).items():
        if name in tensors:
            tensors[name] = tensors[name].to(dtype)
    return tensors


loaders: Registry[Loader] = Registry("strategy")


def open_stored(snapshot: Snapshot) -> Stored:
    """The model's own tensors, through the home of its own format. Raises UsageError if there are no weights."""
    loader = loaders.get(own_format(snapshot))()
    assert isinstance(loader, FormatLoader)
    loader.require()
    return loader.open(snapshot)


def choose_loader(strategy: str, snapshot: Snapshot, device: str = "cpu") -> Loader:
    """The strategy of that name; `auto` is `pipelined` for safetensors on a CUDA device, and else the home of the
    model's own format.

    Raises UsageError if it cannot load this model or is not installed.
    """
    if strategy == "auto":
        strategy = own_format(snapshot)
        if strategy == "safetensors" and device != "cpu":
            strategy = "pipelined"
    loader = loaders.get(strategy)()
    loader.require()
    if reason := loader.obstacle(snapshot):
        raise UsageError(
            f"{strategy} cannot load {snapshot.name}: {reason}", "strategy auto takes what the model's format asks for"
        )
    return loader


def choose_device(device: str) -> str:
    """`cpu` or `cuda:N`: `cuda` is torch's present device, and `auto` that where there is one.

    Raises UsageError for a CUDA device that is not there, or without torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise NotInstalledError("loading", "torch", "torch")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not count):
        return "cpu"
    if device in ("auto", "cuda") and count:
        return f"cuda:{torch.cuda.current_device()}"
    if int(device.partition(":")[2] or 0) >= count:
        raise UsageError(f"there is no device {device!r}: torch sees {count} CUDA devices", "use cpu, or auto")
    return device


_UNREADABLE: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip

_FAILURES: tuple[type[Exception], ...] = (ImportError, OSError, *_UNREADABLE)


@contextlib.contextmanager
def translated_memory_errors(what: object) -> Iterator[None]:
    """Turn torch's error of a device that is full into a WeightctlError."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise WeightctlError(
            f"{what} does not fit into the device's free memory", "free some of it, or load to another device"
        ) from error


@contextlib.contextmanager
def translated_read_errors(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Turn what a library raises over a file that it cannot read (also `more`) into an IntegrityError."""
    try:
        with translated_os_errors(f"read {path}"), translated_memory_errors(path):
            yield
    except (*_UNREADABLE, *more) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        if " " not in reason:  # KeyError
            reason = repr(error)
        raise IntegrityError(f"{path} cannot be read: {reason[:200]}", "it is damaged: fetch it again") from error


@contextlib.contextmanager
def translated_library_errors(
    library: str, snapshot: Snapshot, hint: str = "choose another strategy, or auto"
) -> Iterator[None]:
    """Turn what a library raises over a model whose headers are in order into a WeightctlError."""
    try:
        with translated_memory_errors(snapshot.name):
            yield
    except _FAILURES as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightctlError(f"{library} cannot load {snapshot.name}: {reason[:300]}", hint) from error
