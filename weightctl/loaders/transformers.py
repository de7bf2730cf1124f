"""transformers: from_pretrained as a strategy, and what every use of the library needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from weightctl.errors import UsageError, WeightctlError, translated_os_errors
from weightctl.loaders.base import Loader, loaders, open_stored, translated_library_errors
from weightctl.loaders.stored import listed
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch

USUAL_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


@loaders.register("transformers")
class TransformersLoader(Loader):
    """`from_pretrained` of the class that config.json names."""

    summary = "transformers' from_pretrained"
    requires: ClassVar[Mapping[str, str]] = dict.fromkeys(("torch", "transformers", "accelerate"), "transformers")
    formats = ("safetensors", "torch")

    def __init__(self) -> None:
        self._model: Any = None

    def obstacle(self, snapshot: Snapshot) -> str | None:
        """It wants a config.json and the usual file names."""
        if snapshot.file("config.json") is None:
            return "the model has no config.json"
        if not any(snapshot.file(name) for name in USUAL_FILES):
            return "the model has neither model.safetensors nor pytorch_model.bin"
        return None

    def prepare(self, snapshot: Snapshot) -> None:
        """Import the model's own module too, which transformers does at first use."""
        super().prepare(snapshot)
        config_and_class(snapshot)

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Under transformers' names; tied tensors are one tensor under several names."""
        self._model = self.load_model(snapshot, device, "auto")
        tensors: dict[str, torch.Tensor] = self._model.state_dict()
        return tensors

    def load_model(self, snapshot: Snapshot, device: str, dtype: str | torch.dtype) -> torch.nn.Module:
        """The model, in eval mode. Raises WeightctlError, listing them, for keys that are missing or do not fit."""
        open_stored(snapshot)  # checks the headers before a library believes them
        _, cls = config_and_class(snapshot)
        with translated_errors(snapshot):
            model, info = cls.from_pretrained(
                snapshot.root, local_files_only=True, trust_remote_code=False, weights_only=True, dtype=dtype,
                device_map={"": device}, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
        check_keys(snapshot, info)
        return model.eval()  # type: ignore[no-any-return]

    def as_stored(self, tensors: dict[str, torch.Tensor], snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """Undoes what transformers does to names on loading (fused experts become copies again).

        Non-persistent buffers that old checkpoints hold (position_ids) are taken from the model too, and names that
        only the model has are left out where they are tied to a stored one.
        """
        from transformers.core_model_loading import revert_weight_conversion

        stored = {entry.name for entry in open_stored(snapshot).entries}
        found = dict(self._model.named_buffers())
        buffers = found.keys() - tensors.keys()
        found.update(revert_weight_conversion(self._model, tensors))
        named = {_name_in(name, stored, self._model.base_model_prefix): found[name] for name in found}
        own = {tensor.data_ptr() for name, tensor in named.items() if name in stored}
        return {
            name: tensor
            for name, tensor in named.items()
            if name in stored or not (name in buffers or tensor.data_ptr() in own)
        }


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """config.json; empty if there is none. Raises UsageError if it is no JSON object."""
    file = snapshot.file("config.json")
    if file is None:
        return {}
    with translated_os_errors(f"read {file.source}"):
        data = file.source.read_bytes()
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file.source} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file.source} is not a JSON object")
    return config


def config_and_class(snapshot: Snapshot) -> tuple[Any, Any]:
    """The model's configuration, and the class that its `architectures` names, or else AutoModel's choice."""
    import transformers

    names = read_config(snapshot).get("architectures") or [None]
    if snapshot.file("config.json") is None:
        raise UsageError(f"{snapshot.name} has no config.json", "weightctl.load gives the tensors without a model")
    with translated_errors(snapshot):
        config = transformers.AutoConfig.from_pretrained(snapshot.root, local_files_only=True, trust_remote_code=False)
        cls = getattr(transformers, str(names[0]), None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = transformers.AutoModel._model_mapping[type(config)]
    return config, cls


@contextlib.contextmanager
def translated_errors(snapshot: Snapshot) -> Iterator[None]:
    """What transformers raises over a model that it cannot load; a damaged file is found before it sees it."""
    from transformers.utils import logging

    drawing, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of missing keys is an error here
    hint = "weightctl.load gives the tensors without a model; weightctl runs no code that a model brings along"
    try:
        with translated_library_errors("transformers", snapshot, hint):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if drawing:
            logging.enable_progress_bar()


_KINDS_OF_KEYS = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}


def check_keys(snapshot: Snapshot, info: Mapping[str, Any]) -> None:
    """Raise WeightctlError, listing them, for keys that are missing, unexpected or do not fit."""
    problems = [
        f"{kind}: {listed(str(key[0] if isinstance(key, tuple) else key) for key in info[field])}"
        for kind, field in _KINDS_OF_KEYS.items()
        if info[field]
    ]
    if problems:
        raise WeightctlError(
            f"the tensors of {snapshot.name} are not those of its model class; {'; '.join(problems)}",
            "nothing was left to chance initialisation: check architectures in config.json",
        )


def _name_in(name: str, names: set[str], prefix: str) -> str:
    """`name` as `names` has it: with or without the prefix of the base model, which a checkpoint may hold alone."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in names), name)
