"""The Python API: a model's tensors, or the model, on a device."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from weightctl.config import Config, expanded
from weightctl.errors import UsageError
from weightctl.loaders import Loader, choose_device, choose_loader, open_stored
from weightctl.loaders.models import build_model, converted_dtypes
from weightctl.loaders.modules import fill_module
from weightctl.loaders.ranks import Ranks
from weightctl.loaders.shared import SharedLoader, Wanted, load_together
from weightctl.loaders.slices import Plan
from weightctl.loaders.transformers import TransformersLoader
from weightctl.model import Snapshot, matches
from weightctl.operations.resolve import resolve
from weightctl.operations.serialize import parse_dtype
from weightctl.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def load(
    model: str | Path,
    device: str | torch.device = "auto",
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

    `model` is a MODEL, or the path of one weight file (model.tensors). `device` is `cpu`, `cuda:N`, `cuda` (torch's
    present one) or `auto` (that, where there is one), `strategy` a name that `weightctl backends` lists or `auto`
    (`pipelined` for safetensors on CUDA, else what the model's own format asks for). `tensors` are names or globs of
    those that are wanted, and `dtype` (`bfloat16`) converts the floating tensors that `from_pretrained` would convert;
    `pipelined` reads only what is wanted, and converts on the device. Tied tensors share their memory, and several may
    be views of one allocation: clone what has to outlive the rest. On the CPU tensors may be views of the mapped files.

    With a `process_group` of torch.distributed (NCCL for CUDA, gloo for the CPU) every rank of it calls this, each with
    a device of its own. Those of one host read every byte once between them, and exchange it. With a `plan` each has
    its slices: glob over names of tensors or of their modules → the dimension to cut along as `torch.chunk` does
    (`colwise` and `rowwise` as transformers means them); what no glob matches is whole. If one rank fails, all raise.
    With gloo they do so as soon as one was killed, and the group is of no use then. What else keeps a rank silent (a
    host that has vanished; with NCCL, a kill) ends them after the group's timeout: `init_process_group(timeout=…)`.

    Raises UsageError for what cannot be, IntegrityError if the model's files are damaged, or differ between ranks.
    """

    if plan is not None and process_group is None:
        raise UsageError("a plan is for the ranks of a process group, and there is none", "give process_group")

    def wanted() -> Wanted:
        snapshot, _, chosen = _chosen(model, device, _shared(strategy), revision, include, exclude, progress)
        return Wanted(snapshot, chosen, _names(snapshot, tensors), _dtypes(snapshot, dtype))

    if process_group is not None:
        return load_together(process_group, device, wanted, plan)
    snapshot, loader, device = _chosen(model, device, strategy, revision, include, exclude, progress)
    return loader.load_part(snapshot, device, _names(snapshot, tensors), _dtypes(snapshot, dtype))


def load_into(
    module: torch.nn.Module,
    model: str | Path,
    device: str | torch.device = "auto",
    strategy: str = "auto",
    *,
    process_group: ProcessGroup | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = Progress(),  # noqa: B008
) -> None:
    """Load a model's tensors into any torch module that has the same names (Diffusers, a module of one's own).

    What is on the meta device is replaced by the loaded tensor, without a copy, in the dtype that the files give; what
    has memory already is copied into, and keeps its dtype and device. Tied parameters stay tied. The rest is as for
    `load`; with a `process_group`, every rank fills a module of its own with the whole model. Raises WeightctlError,
    listing them, for tensors that are missing, unexpected or of another shape; the module is unchanged then.
    """

    def fill(shared: Ranks | None = None) -> None:
        snapshot, loader, chosen = _chosen(model, device, strategy, revision, include, exclude, progress, shared)
        fill_module(module, loader.load_part(snapshot, chosen), snapshot.name)

    _by_all(process_group, device, fill)


def load_model(
    model: str | Path,
    device: str | torch.device = "auto",
    strategy: str = "auto",
    *,
    dtype: str | torch.dtype = "auto",
    process_group: ProcessGroup | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Progress = Progress(),  # noqa: B008
) -> torch.nn.Module:
    """The transformers model that config.json describes, in eval mode on `device`, its weights brought by `strategy`.

    Equal to what `from_pretrained` gives: `dtype` (`bfloat16`) is its argument, and `auto` what config.json says. The
    parameters are the loaded tensors themselves, so that the device holds the model once; only what transformers
    fuses (experts) is there twice for a moment, 1 GiB or a fiftieth of the model at a time. The rest is as for `load`;
    with a `process_group`, every rank gets the whole model. Raises WeightctlError, listing them, for tensors that are
    missing, unexpected or of another shape.
    """

    def build(shared: Ranks | None = None) -> torch.nn.Module:
        wanted = dtype if dtype == "auto" else parse_dtype(dtype)
        assert wanted is not None
        snapshot, loader, chosen = _chosen(model, device, strategy, revision, include, exclude, progress, shared)
        TransformersLoader.require()
        if isinstance(loader, TransformersLoader):
            return loader.load_model(snapshot, chosen, wanted)
        return build_model(snapshot, loader, chosen, wanted)

    return _by_all(process_group, device, build)


def _by_all(group: ProcessGroup | None, device: str | torch.device, work: Callable[..., T]) -> T:
    """What `work()` gives, or `work(ranks)` by all ranks of `group`; if it fails on one, it does on all."""
    if group is None:
        return work()
    ranks = Ranks(group, device)
    return ranks.agree(lambda: work(ranks))[0]


def _names(snapshot: Snapshot, tensors: Sequence[str]) -> frozenset[str] | None:
    if not (globs := _globs(tensors)):
        return None
    there = [entry.name for entry in open_stored(snapshot).entries]
    for wanted in globs:
        if not any(matches(name, [wanted], ()) for name in there):
            raise UsageError(
                f"{snapshot.name} has no tensor {wanted!r}", f"the first it has is {min(there, default='')!r}"
            )
    return frozenset(name for name in there if matches(name, globs, ()))


def _globs(value: Sequence[str]) -> tuple[str, ...]:
    """A string is one glob, not as many as it has letters."""
    return (value,) if isinstance(value, str) else tuple(value)


def _dtypes(snapshot: Snapshot, dtype: str | torch.dtype | None) -> dict[str, torch.dtype] | None:
    wanted = parse_dtype(dtype)
    return None if wanted is None else converted_dtypes(snapshot, wanted)


def _chosen(
    model: str | Path,
    device: str | torch.device,
    strategy: str,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Progress,
    shared: Ranks | None = None,
) -> tuple[Snapshot, Loader, str]:
    strategy = _shared(strategy) if shared else strategy
    given = {name: value for name, value in (("device", str(device)), ("strategy", strategy)) if value != "auto"}
    config = Config.load(given, dashes="")
    if not isinstance(model, (str, Path)):
        raise UsageError(f"a MODEL is a string or a Path, not {model!r}", "./dir, or org/name")
    text = str(model)
    if isinstance(model, Path) and not model.is_absolute():
        text = f"./{text}"
    if text.startswith(("/", "./", "../", "~/")) and (path := expanded(text)).is_file():
        text, include = str(path.parent.absolute()), (glob.escape(path.name), "config.json", "generation_config.json")
    snapshot = resolve(
        text, revision=revision, include=_globs(include), exclude=_globs(exclude), verify=False, config=config,
        progress=progress,
    )  # fmt: skip
    chosen = choose_device(config.device)
    loader = choose_loader(config.strategy, snapshot, chosen)
    return snapshot, SharedLoader(shared) if shared else loader, chosen


def _shared(strategy: str) -> str:
    """The one that loads for a process group. Raises UsageError if `strategy` is another."""
    if strategy not in ("auto", "pipelined"):
        raise UsageError(f"{strategy} does not load for a process group", "take strategy auto, or no process_group")
    return "pipelined"
