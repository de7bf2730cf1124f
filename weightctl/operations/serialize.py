"""Write a model's weights as one file that loads quickly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightctl import storage
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.loaders import FormatLoader, loaders, open_stored, weight_files
from weightctl.loaders.models import converted_dtypes
from weightctl.loaders.stored import Stored, difference
from weightctl.model import File, Reference, Snapshot
from weightctl.operations import resolve
from weightctl.progress import Progress

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""What floating tensors can be converted to."""


@dataclass(frozen=True)
class SerializeResult:
    """A file that was read back and compared."""

    path: Path
    format: str
    tensors: int
    bytes: int
    verified: bool
    seconds: float


@dataclass(frozen=True)
class SerializePlan:
    """What a serialize would write."""

    path: Path
    format: str
    bytes: int
    """Of the tensors, or of the weight files while some of them are not here."""
    missing_bytes: int
    """To be fetched first."""


def serialize(
    model: str,
    output: Path,
    *,
    format: str = "tensorizer",
    dtype: str | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> SerializeResult:
    """Write all tensors of `model` to the file `output`, read it back, compare every byte, then give it its name.

    `dtype` converts the floating tensors that `from_pretrained` would convert (`converted_dtypes` tells which).
    An earlier `output` stays as it is until then. Raises IntegrityError if the model's files are damaged.
    """
    began = time.monotonic()
    home = _home(format)
    wanted = parse_dtype(dtype)
    found = resolve.plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    output = output.absolute()
    _check_output(output, found.snapshot, Reference.parse(model).source == "directory")
    snapshot = resolve.fetch(found, verify=True, config=config, progress=progress)
    stored = _converted(snapshot, wanted)
    write_verified(home, stored, output, progress)
    return SerializeResult(output, format, len(stored.entries), output.stat().st_size, True, time.monotonic() - began)


def plan_serialize(
    model: str,
    output: Path,
    *,
    format: str = "tensorizer",
    dtype: str | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> SerializePlan:
    """What `serialize` would write. Moves nothing."""
    _home(format)
    wanted = parse_dtype(dtype)
    found = resolve.plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    output = output.absolute()
    _check_output(output, found.snapshot, Reference.parse(model).source == "directory")
    if missing := sum(file.size for file in found.missing):
        return SerializePlan(output, format, sum(file.size for file in weight_files(found.snapshot)), missing)
    return SerializePlan(output, format, _converted(found.snapshot, wanted).bytes, 0)


def _converted(snapshot: Snapshot, dtype: torch.dtype | None) -> Stored:
    stored = open_stored(snapshot)
    if not stored.entries:
        raise UsageError(f"{snapshot.name} holds no tensors", "there is nothing to write")
    return stored if dtype is None else stored.cast(converted_dtypes(snapshot, dtype))


def write_verified(home: FormatLoader, stored: Stored, output: Path, progress: Progress) -> None:
    """Write `stored` to `output` in the format of `home`. It gets its name once it was read back and found equal."""
    with translated_os_errors(f"write {output}"):
        storage.make_directories(output.parent)
        storage.check_space(output.parent, stored.bytes)
        with storage.staging_beside(output) as staging, storage.staged_file(staging) as staged:
            with progress.task(f"writing {output.name}", stored.bytes) as task:
                home.write(stored, staged.path, task)
            written = File(home.filename, staged.path.stat().st_size, staged.path)
            with progress.task(f"comparing {output.name}", stored.bytes) as task:
                found = difference(stored, home.open(Snapshot(output.name, output.parent, (written,))), task)
            if found:
                raise IntegrityError(
                    f"{output} was written, but what was read back differs: {found}", "check that disk, then try again"
                )
            staged.publish(output)


def _home(format: str) -> FormatLoader:
    if format != "tensorizer":
        raise UsageError(f"unknown format {format!r}", "known: tensorizer")
    loader = loaders.get(format)()
    assert isinstance(loader, FormatLoader)
    loader.require()
    return loader


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating dtype of that name (`bfloat16`; or torch's own). Raises UsageError if there is none."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"cannot convert to {name!r}", f"known: {', '.join(DTYPES)}")
    import torch

    return getattr(torch, name)  # type: ignore[no-any-return]


def _check_output(output: Path, snapshot: Snapshot, is_directory: bool) -> None:
    if output.is_dir():
        raise UsageError(f"{output} is a directory", "--output is the file to write, such as model.tensors")
    if not is_directory and output.resolve().is_relative_to(snapshot.root.resolve()):
        raise UsageError(f"{output} lies inside {snapshot.root}, which must stay as it is", "choose another place")
    if output.exists() and any(file.source.samefile(output) for file in snapshot.files):
        raise UsageError(f"{output} is a file of the model itself", "choose another name")
