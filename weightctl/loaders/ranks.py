"""The processes that load a model together: which of them share a host, and what they tell each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightctl.errors import IntegrityError, UsageError, WeightctlError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

T = TypeVar("T")
Letter = Mapping[str, Any]
"""What one rank tells all others: JSON."""

_groups: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()
"""A group → the one of its ranks on this host, kept: to make it takes NCCL a good part of a second."""


def this_host() -> str:
    """Equal for processes that see the same files through the same page cache.

    NCCL_HOSTID, where it is set, tells as it tells NCCL. A hostname would not do: clones share theirs.
    """
    if given := os.environ.get("NCCL_HOSTID"):
        return given
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, *(str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("mnt", "pid"))])
    except OSError:
        return socket.gethostname()


class Ranks:
    """A process group of torch.distributed, as one of its members sees it."""

    def __init__(self, group: ProcessGroup, device: str) -> None:
        """`device` is where this rank's tensors are to be. Raises UsageError if this process is not of the group."""
        from torch import distributed

        self.group = group
        self.rank = distributed.get_rank(group)
        if self.rank < 0:
            raise UsageError("this process does not belong to the process group", "load in its members only")
        self.size = distributed.get_world_size(group)
        self._device = _own_device(group, device)

    def agree(self, work: Callable[[], T], tell: Callable[[T], Letter] = lambda _: {}) -> tuple[T, list[Letter]]:
        """What `work` gives here, and what each rank has to `tell` of its own. If it fails on one, it does on all.

        Every rank calls it, as often as every other. Raises the rank's own error, or the first rank's that has one.
        """
        try:
            result = work()
            letter = tell(result)
        except BaseException as error:
            with contextlib.suppress(WeightctlError):  # that the others are gone is not what failed first
                self._exchange(_complaint(error))
            raise
        letters = self._exchange(letter)
        for rank, other in enumerate(letters):
            if "error" in other:
                kind = _KINDS[other["exit_code"]]
                raise kind(f"rank {rank} could not load the model: {other['error']}", other["hint"])
        return result, letters

    def mates(self, hosts: Sequence[str]) -> tuple[int, ...]:
        """The ranks on this host, of which this is one, where `hosts` are those of all ranks."""
        return tuple(rank for rank, host in enumerate(hosts) if host == hosts[self.rank])

    def group_of(self, mates: Sequence[int]) -> ProcessGroup:
        """The group of the ranks on this host: they all call it."""
        from torch import distributed

        if len(mates) == self.size:
            return self.group
        if self.group not in _groups:
            everyone = distributed.get_process_group_ranks(self.group)
            with translated_group_errors():
                _groups[self.group] = distributed.new_group(
                    [everyone[rank] for rank in mates],
                    backend=distributed.get_backend(self.group),
                    use_local_synchronization=True,
                )
        return _groups[self.group]

    def _exchange(self, letter: Letter) -> list[Letter]:
        import torch

        encoded = json.dumps(letter).encode()
        lengths = self._gather(torch.tensor([len(encoded)])).tolist()
        padded = encoded.ljust(max(lengths))
        rows = self._gather(torch.frombuffer(bytearray(padded), dtype=torch.uint8)).view(self.size, -1)
        return [json.loads(bytes(row.tolist())) for row in rows]

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        sent = tensor.to(self._device)
        with translated_group_errors():
            received = torch.empty(self.size * sent.numel(), dtype=sent.dtype, device=self._device)
            all_gather(received, sent, self.group).wait()
            return received.cpu()


@contextlib.contextmanager
def translated_group_errors() -> Iterator[None]:
    """Turn what torch.distributed raises into a WeightctlError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightctlError(
            f"the ranks lost each other: {reason[:300]}", "another rank may have ended: its own error says why"
        ) from error


def all_gather(received: torch.Tensor, sent: torch.Tensor, group: ProcessGroup) -> Any:
    """Begin to fill `received` with every rank's `sent`, which may be where it belongs there; the work to wait for."""
    from torch import distributed

    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # before torch 2.13
    return gather(received, sent, group=group, async_op=True)


def check_backend(group: ProcessGroup, device: str) -> None:
    """Raises UsageError if the group does not exchange what is on `device`."""
    backends = _backends(group)
    kind = device.partition(":")[0]
    if kind not in backends or (kind, backends[kind]) == ("cuda", "gloo"):
        wanted = {"cpu": "gloo", "cuda": "nccl"}[kind]
        raise UsageError(
            f"the process group exchanges nothing on {device}: its backend is {', '.join(set(backends.values()))}",
            f"init_process_group({wanted!r})",
        )


def _backends(group: ProcessGroup) -> dict[str, str]:
    from torch import distributed

    return dict(pair.split(":") for pair in distributed.get_backend_config(group).split(","))


def _own_device(group: ProcessGroup, device: str) -> torch.device:
    """Where letters lie: on the CPU, if the group can; on no GPU that is another rank's."""
    import torch

    if "cpu" in _backends(group):
        return torch.device("cpu")
    number = device.removeprefix("cuda:")
    if number.isdecimal() and int(number) < torch.cuda.device_count():
        return torch.device("cuda", int(number))
    return torch.device("cuda", torch.cuda.current_device())


_KINDS = {kind.exit_code: kind for kind in (WeightctlError, UsageError, IntegrityError)}


def _complaint(error: BaseException) -> Letter:
    if isinstance(error, WeightctlError):
        return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return {"error": what, "hint": "its own output says more", "exit_code": WeightctlError.exit_code}
