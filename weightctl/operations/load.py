"""The Python API: a model's tensors, or the model, on a device."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.loaders import Loader, choose_device, choose_loader, open_stored
from weightctl.loaders.models import build_model, converted_dtypes
from weightctl.loaders.modules import fill_module
from weightctl.loaders.shared import Wanted, load_together
from weightctl.loaders.slices import Plan
from weightctl.loaders.transformers import TransformersLoader
from weightctl.model import Snapshot, matches
from weightctl.operations.resolve import resolve
from weightctl.operations.serialize import parse_dtype
from weightctl.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


def load(
    model: str | Path,
    device: str = "auto",
    strategy: str = "auto",
    *,
    tensors: Sequence[str] = (),
    dtype: str | torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    plan: Plan | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = Progress(),  # noqa: B008
) -> dict[str, torch.Tensor]:
    """Every tensor of a model by name, with the dtype and shape that its files give, on `device`.

    `model` is a MODEL, or the path of one weight file (model.tensors). `device` is `cpu`, `cuda`, `cuda:N` or `auto`
    (CUDA where there is one), `strategy` a name that `weightctl backends` lists or `auto` (`pipelined` for safetensors
    on CUDA, else what the model's own format asks for). `tensors` are names or globs of those that are wanted, and
    `dtype` (`bfloat16`) converts the floating tensors that `from_pretrained` would convert; `pipelined` reads only
    what is wanted, and converts on the device. Tied tensors share their memory, and several may be views of one
    allocation: clone what has to outlive the rest. On the CPU tensors may be views of the mapped files.

    With a `process_group` of torch.distributed (NCCL for CUDA, gloo for the CPU) every rank of it calls this, each with
    a device of its own. Those of one host read every byte once between them, and exchange it. With a `plan` each has
    its slices: glob over names of tensors or of their modules → the dimension to cut along as `torch.chunk` does
    (`colwise` and `rowwise` as transformers means them); what no glob matches is whole. If one rank fails, all raise.

    Raises UsageError for what cannot be, IntegrityError if the model's files are damaged, or differ between ranks.
    """

    def wanted() -> Wanted:
        if strategy not in ("auto", "pipelined"):
            raise UsageError(f"{strategy} does not load for a process group", "take strategy auto, or no process_group")
        snapshot, _, chosen = _chosen(model, device, "pipelined", revision, include, exclude, progress)
        return Wanted(snapshot, chosen, _names(snapshot, tensors), _dtypes(snapshot, dtype))

    if process_group is not None:
        return load_together(process_group, device, wanted, plan)
    if plan is not None:
        raise UsageError("a plan is for the ranks of a process group, and there is none", "give process_group")
    snapshot, loader, device = _chosen(model, device, strategy, revision, include, exclude, progress)
    return loader.load_part(snapshot, device, _names(snapshot, tensors), _dtypes(snapshot, dtype))


def load_into(
    module: torch.nn.Module,
    model: str | Path,
    device: str = "auto",
    strategy: str = "auto",
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = Progress(),  # noqa: B008
) -> None:
    """Load a model's tensors into any torch module that has the same names (Diffusers, a module of one's own).

    What is on the meta device is replaced by the loaded tensor, without a copy, in the dtype that the files give; what
    has memory already is copied into, and keeps its dtype and device. Tied parameters stay tied. The rest is as for
    `load`. Raises WeightctlError, listing them, for tensors that are missing, unexpected or of another shape; the
    module is unchanged then.
    """
    snapshot, loader, device = _chosen(model, device, strategy, revision, include, exclude, progress)
    fill_module(module, loader.load_part(snapshot, device), snapshot.name)


def load_model(
    model: str | Path,
    device: str = "auto",
    strategy: str = "auto",
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = Progress(),  # noqa: B008
) -> torch.nn.Module:
    """The transformers model that config.json describes, in eval mode on `device`, its weights brought by `strategy`.

    Equal to what `from_pretrained` gives: `dtype` (`bfloat16`) is its argument, and `auto` what config.json says. The
    parameters are the loaded tensors themselves, so that the device holds the model once; only what transformers
    fuses (experts) is there twice for a moment, 1 GiB or a fiftieth of the model at a time. The rest is as for `load`.
    Raises WeightctlError, listing them, for tensors that are missing, unexpected or of another shape.
    """
    wanted = dtype if dtype == "auto" else parse_dtype(dtype)
    assert wanted is not None
    snapshot, loader, device = _chosen(model, device, strategy, revision, include, exclude, progress)
    TransformersLoader.require()
    if isinstance(loader, TransformersLoader):
        return loader.load_model(snapshot, device, wanted)
    return build_model(snapshot, loader, device, wanted)


def _names(snapshot: Snapshot, globs: Sequence[str]) -> frozenset[str] | None:
    if not globs:
        return None
    there = [entry.name for entry in open_stored(snapshot).entries]
    for wanted in globs:
        if not any(matches(name, [wanted], ()) for name in there):
            raise UsageError(
                f"{snapshot.name} has no tensor {wanted!r}", f"the first it has is {min(there, default='')!r}"
            )
    return frozenset(name for name in there if matches(name, globs, ()))


def _dtypes(snapshot: Snapshot, dtype: str | torch.dtype | None) -> dict[str, torch.dtype] | None:
    wanted = parse_dtype(dtype)
    return None if wanted is None else converted_dtypes(snapshot, wanted)


def _chosen(
    model: str | Path,
    device: str,
    strategy: str,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Progress,
) -> tuple[Snapshot, Loader, str]:
    config = Config.load({name: v for name, v in (("device", device), ("strategy", strategy)) if v != "auto"})
    text = str(model)
    if isinstance(model, Path) and not model.is_absolute():
        text = f"./{text}"
    if text.startswith(("/", "./", "../", "~/")) and (path := Path(text).expanduser()).is_file():
        text, include = str(path.parent.absolute()), (glob.escape(path.name), "config.json", "generation_config.json")
    snapshot = resolve(
        text, revision=revision, include=include, exclude=exclude, verify=False, config=config, progress=progress
    )
    chosen = choose_device(config.device)
    return snapshot, choose_loader(config.strategy, snapshot, chosen), chosen
