"""What a load strategy has to do: bring a model's weights onto a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from weightctl.model import Snapshot
from weightctl.registry import Backend, Registry

if TYPE_CHECKING:
    import torch


class Loader(Backend, ABC):
    """One way to load weights."""

    formats: ClassVar[tuple[str, ...]]
    """The weight formats it reads: `safetensors`, `torch`, `tensorizer`."""

    @abstractmethod
    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Every tensor of the model by name, on `device` (`cpu`, `cuda`, `cuda:N`), ready for use on return.

        Raises UsageError if the model holds none of `formats`, IntegrityError if its files are damaged.
        """


loaders: Registry[Loader] = Registry("strategy")
