"""Loaded tensors into a torch module that someone else has made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weightctl.errors import WeightctlError
from weightctl.loaders.stored import listed, same_bytes

if TYPE_CHECKING:
    import torch


def fill_module(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Put `tensors` into the parameters and persistent buffers of `module`, which they have to match one to one.

    Of tied parameters, one has to be there; if there are more, they have to be equal. Meta tensors are replaced,
    others copied into. Raises WeightctlError, listing what does not match, before anything is changed.
    """
    import torch

    state = module.state_dict(keep_vars=True)
    there = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    places: dict[int, list[str]] = {}  # of one tensor that several names may share
    for key, old in there.items():
        places.setdefault(id(old), []).append(key)
    found = {keys[0]: [key for key in keys if key in tensors] for keys in places.values()}
    _raise_if_any(
        name,
        {
            "missing": [key for key, given in found.items() if not given],
            "unexpected": [key for key in tensors if key not in there],
            "of another shape": [key for key in tensors if key in there and there[key].shape != tensors[key].shape],
            "tied in the module but not equal": [
                key for given in found.values() for key in given[1:] if not _equal(tensors[key], tensors[given[0]])
            ],
            "on the meta device and not stored": [
                key for key, old in module.named_buffers() if old.is_meta and key not in there
            ],
        },
    )
    for keys in places.values():
        _put(module, keys, there[keys[0]], tensors[found[keys[0]][0]])


def _put(module: torch.nn.Module, keys: list[str], old: torch.Tensor, new: torch.Tensor) -> None:
    import torch

    if not old.is_meta:
        with torch.no_grad():
            old.copy_(new)
        return
    if isinstance(old, torch.nn.Parameter):
        new = torch.nn.Parameter(new, old.requires_grad and (new.is_floating_point() or new.is_complex()))
    for key in keys:
        path, _, attribute = key.rpartition(".")
        setattr(module.get_submodule(path), attribute, new)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and same_bytes(one, other)


def _raise_if_any(name: str, problems: Mapping[str, list[str]]) -> None:
    found = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
    if found:
        raise WeightctlError(
            f"the tensors of {name} are not those of the module; {found}",
            "nothing was changed: make the module as the model's authors do",
        )
