"""A transformers model made without memory, and the tensors that a strategy brings put into it where they lie."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightctl.checkpoint import read_checkpoint
from weightctl.errors import UsageError
from weightctl.loaders.base import Loader, open_stored, own_format
from weightctl.loaders.stored import Entry, Stored
from weightctl.loaders.transformers import (
    TransformersLoader,
    check_keys,
    config_and_class,
    read_config,
    translated_errors,
)
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch

PORTION_BYTES = 1 << 30
"""Tensors that transformers fuses into new ones (experts) are brought so many bytes at a time, or a fiftieth of the
model where that is more: for a moment they are on the device twice."""


def build_model(
    snapshot: Snapshot, loader: Loader, device: str, dtype: str | torch.dtype, portion_bytes: int = PORTION_BYTES
) -> torch.nn.Module:
    """The transformers model in eval mode, around the tensors that `loader` brings: its parameters are views of them,
    except for what transformers fuses. `dtype` is that of `from_pretrained`; conversion is left to `loader`.

    Raises WeightctlError, listing them, for keys that are missing, unexpected or do not fit.
    """
    stored = open_stored(snapshot)
    if read_config(snapshot).get("quantization_config") or not _takes_ready_tensors():
        return _around_state_dict(snapshot, loader.load(snapshot, device), device, dtype)
    with translated_errors(snapshot):
        blank = Blank(snapshot, stored, dtype, device)
        places = {entry.name: blank.place(entry.name) for entry in stored.entries}
        dtypes = {
            entry.name: wanted
            for entry in stored.entries
            if (wanted := places[entry.name].dtype) and wanted != entry.dtype
        }
        if type(loader).load_part is Loader.load_part:  # which brings everything, however little is wanted
            blank.fill(loader.load_part(snapshot, device, None, dtypes))
        else:
            for names in _portions(stored, places, max(portion_bytes, stored.bytes // 50)):
                blank.fill(loader.load_part(snapshot, device, names, dtypes))
        return blank.finish(snapshot)


@dataclass(frozen=True)
class Place:
    """What a stored tensor becomes."""

    target: str
    """The model's name for it, or for the (first) tensor that it becomes a part of."""
    fused: bool
    """Whether transformers computes the model's tensor from this one and perhaps others."""
    dtype: torch.dtype | None
    """As `from_pretrained` would convert it; None if the model has no such tensor."""


class Blank:
    """A model on the meta device, and what transformers knows of getting a checkpoint into it."""

    def __init__(self, snapshot: Snapshot, stored: Stored, dtype: str | torch.dtype, device: str = "cpu") -> None:
        import torch
        from transformers import modeling_utils
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.utils.generic import ContextManagers

        config, cls = config_and_class(snapshot)
        files, samples = None, None
        if own_format(snapshot) == "tensorizer":
            samples = {entry.name: torch.empty(0, dtype=entry.dtype, device="meta") for entry in stored.entries}
        else:
            # By the model's names: transformers goes by the extension, which a blob in the Hub's cache lacks.
            files = [str(snapshot.root / file.path) for file in read_checkpoint(snapshot).files]
        config, dtype = modeling_utils._get_dtype(dtype, files, config, None, samples, True)
        config.name_or_path = str(snapshot.root)
        with ContextManagers(cls.get_init_context(dtype, False, False, None)):
            self.model = cls(config)
        self._there = {**dict(self.model.named_buffers()), **self.model.state_dict()}
        self._kept = self.model._get_dtype_plan(dtype)  # what the class keeps in float32
        self._conversions = get_model_conversion_mapping(self.model)
        self._loading = modeling_utils.LoadStateDictConfig(
            ignore_mismatched_sizes=True, device_map={"": device}, dtype=dtype, dtype_plan=self._kept,
            weight_mapping=self._conversions,
        )  # fmt: skip
        self._info: Any = None

    def place(self, name: str) -> Place:
        """What becomes of the stored tensor `name`."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [one for one in self._conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in self._conversions if isinstance(one, WeightConverter)]
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, self._there)
        if target not in self._there and name in self._there:
            target, pattern = rename_source_key(name, [], [], prefix, self._there)
        if target not in self._there:
            return Place(target, False, None)
        kept = (dtype for glob, dtype in self._kept.items() if re.search(glob.replace("*", ".*"), target))
        return Place(target, pattern is not None, next(kept, self._there[target].dtype))

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put some of the stored tensors, all parts of a fused one together, into the model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        info, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._loading)
        if self._info is not None:
            info.missing_keys &= self._info.missing_keys
            info.unexpected_keys |= self._info.unexpected_keys
            info.mismatched_keys |= self._info.mismatched_keys
            info.conversion_errors |= self._info.conversion_errors
        self._info = info

    def finish(self, snapshot: Snapshot) -> torch.nn.Module:
        """The model, when it was filled: tied, with the buffers that are not stored, in eval mode."""
        info = self.model._finalize_model_loading(self.model, self._loading, self._info)
        check_keys(snapshot, info.to_dict())
        return _ready(self.model, snapshot)


def _portions(stored: Stored, places: Mapping[str, Place], most: int) -> Iterator[list[str]]:
    """The names of what is used as it is; then of what is fused, up to `most` bytes at a time, parts together."""
    yield [entry.name for entry in stored.entries if not places[entry.name].fused]
    parts: dict[str, list[Entry]] = {}
    for entry in stored.entries:
        if places[entry.name].fused:
            parts.setdefault(places[entry.name].target, []).append(entry)
    portion: list[str] = []
    size = 0
    for entries in parts.values():
        nbytes = sum(entry.nbytes for entry in entries)
        if portion and size + nbytes > most:
            yield portion
            portion, size = [], 0
        portion += [entry.name for entry in entries]
        size += nbytes
    if portion:
        yield portion


def _takes_ready_tensors() -> bool:
    """Whether transformers' own pieces are those that `Blank` is made of (5.17 to 5.23: no public name does it)."""
    try:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model, rename_source_key
        from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel, _get_dtype

        inspect.signature(convert_and_load_state_dict_in_model).bind("model", "tensors", "config")
        inspect.signature(rename_source_key).bind("name", "renamings", "converters", "prefix", "there")
        inspect.signature(_get_dtype).bind("dtype", "files", "config", "metadata", "tensors", "weights_only")
        inspect.signature(PreTrainedModel.get_init_context).bind("dtype", False, False, None)
        inspect.signature(PreTrainedModel._finalize_model_loading).bind("model", "config", "info")
        inspect.signature(LoadStateDictConfig).bind(
            ignore_mismatched_sizes=True, device_map={}, dtype=None, dtype_plan={}, weight_mapping=[]
        )
    except (ImportError, AttributeError, TypeError):
        return False
    return True


def _around_state_dict(
    snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: str, dtype: str | torch.dtype
) -> torch.nn.Module:
    """By from_pretrained itself, which allocates about the model's size on the device once more, and frees it.

    For quantized models, and other versions of transformers.
    """
    config, cls = config_and_class(snapshot)
    with translated_errors(snapshot):
        model, info = cls.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, device_map={"": device},
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
        check_keys(snapshot, info)
        model.name_or_path = model.config.name_or_path = str(snapshot.root)
        return _ready(model, snapshot)


def _ready(model: Any, snapshot: Snapshot) -> torch.nn.Module:
    if model.can_generate():
        from transformers import GenerationConfig

        where = {"config_file_name": "config.json", "_from_model_config": True}
        if snapshot.file("generation_config.json"):
            where = {}
        model.generation_config = GenerationConfig.from_pretrained(snapshot.root, local_files_only=True, **where)
    return model.eval()  # type: ignore[no-any-return]


def converted_dtypes(snapshot: Snapshot, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name → dtype of every tensor that `from_pretrained(dtype=…)` would convert.

    Those are the floating tensors of 16 bits and more, except what the model's class creates in, or keeps in, a dtype
    of its own (rotary frequencies, layers that need float32). Without transformers or a config.json only tensors
    named inv_freq are kept. Raises UsageError for a quantized model.
    """
    if read_config(snapshot).get("quantization_config"):
        raise UsageError(f"{snapshot.name} is quantized: its tensors have the dtypes they need", "leave out --dtype")
    stored = open_stored(snapshot)
    floating = [entry for entry in stored.entries if entry.dtype.is_floating_point and entry.dtype.itemsize >= 2]
    wanted = {entry.name: entry.dtype if entry.name.endswith("inv_freq") else dtype for entry in floating}
    if snapshot.file("config.json") and TransformersLoader.unavailable() is None:
        with translated_errors(snapshot):
            blank = Blank(snapshot, stored, dtype)
            wanted.update((name, own) for name in wanted if (own := blank.place(name).dtype))
    return {entry.name: wanted[entry.name] for entry in floating if wanted[entry.name] != entry.dtype}
