"""Strategies that must not be believed, registered by importing this."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from weightctl.loaders.base import loaders
from weightctl.loaders.safetensors import SafetensorsLoader
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch


class Fake(SafetensorsLoader):
    """Loads as safetensors does, then does harm."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        """What it does to the tensors."""

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in super().load(snapshot, device).items()}
        self.harm(tensors)
        return tensors


@loaders.register("one-bit")
class OneBit(Fake):
    """Flips one bit of one tensor."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        import torch

        tensors["b"].view(torch.uint8)[-1] ^= 1


@loaders.register("one-less")
class OneLess(Fake):
    """Leaves a tensor out."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        del tensors["b"]


@loaders.register("hangs")
class Hangs(Fake):
    """Never ends, and neither does its child."""

    def prepare(self, snapshot: Snapshot) -> None:
        subprocess.Popen(["sh", "-c", f"sleep 600; : {os.environ['HANGS']}"])
        time.sleep(600)


@loaders.register("crashes")
class Crashes(Fake):
    """Dies of a segmentation fault."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        ctypes.string_at(0)


@loaders.register("killed")
class Killed(Fake):
    """Is killed, as for want of memory."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@loaders.register("raises")
class Raises(Fake):
    """Has a bug."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        print("what it prints must not be taken for a result")
        raise ZeroDivisionError("a bug")


@loaders.register("missing")
class Missing(Fake):
    """Needs what is not installed."""

    requires: ClassVar[dict[str, str]] = {"no_such_module": "torch"}


@loaders.register("steady")
class Steady(Fake):
    """Takes half a second longer."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        time.sleep(0.5)


@loaders.register("delayed")
class Delayed(Fake):
    """Takes DELAY seconds longer."""

    def harm(self, tensors: dict[str, torch.Tensor]) -> None:
        time.sleep(float(os.environ["DELAY"]))


@loaders.register("holds-once")
class HoldsOnce(Fake):
    """Maps its file before the clock starts, so that nothing of it leaves the page cache, until HELD is there."""

    def prepare(self, snapshot: Snapshot) -> None:
        super().prepare(snapshot)
        held = Path(os.environ["HELD"])
        if not held.exists():
            held.touch()
            with snapshot.files[0].source.open("rb") as stream:
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                self.mapping = mmap.mmap(stream.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
