"""How weights reach a device."""

from weightctl.loaders import (
    fastsafetensors,
    instanttensor,
    pipelined,
    runai,
    safetensors,
    tensorizer,
    torch,
    transformers,
)
from weightctl.loaders.base import (
    FormatLoader,
    Loader,
    choose_device,
    choose_loader,
    loaders,
    open_stored,
    own_format,
    weight_files,
)

__all__ = [
    "FormatLoader",
    "Loader",
    "choose_device",
    "choose_loader",
    "fastsafetensors",
    "instanttensor",
    "loaders",
    "open_stored",
    "own_format",
    "pipelined",
    "runai",
    "safetensors",
    "tensorizer",
    "torch",
    "transformers",
    "weight_files",
]
