"""The processes that load a model together: which of them share a host, and what they tell each other."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightctl.errors import IntegrityError, UsageError, WeightctlError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Work

T = TypeVar("T")
Letter = Mapping[str, Any]
"""What one rank tells all others: JSON."""

LEAVING = 0x77656967
"""The tag of messages that nobody sends."""


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

    def __init__(self, group: ProcessGroup, device: str | torch.device) -> None:
        """`device` is where this rank's tensors are to be. Raises UsageError if this process is not of the group."""
        from torch import distributed

        self.group = group
        self.rank = distributed.get_rank(group)
        if self.rank < 0:
            raise UsageError("this process does not belong to the process group", "load in its members only")
        self.size = distributed.get_world_size(group)
        self._device = _own_device(group, str(device))
        self._over = False

    def agree(self, work: Callable[[], T], tell: Callable[[T], Letter] = lambda _: {}) -> tuple[T, list[Letter]]:
        """What `work` gives here, and what each rank has to `tell` of its own. If it fails on one, it does on all.

        Every rank calls it, as often as every other; `work` may do so too. Raises the rank's own error, or the first
        rank's that has one: then that was their last exchange.
        """
        try:
            result = work()
            letter = tell(result)
        except BaseException as error:
            if not self._over:
                with contextlib.suppress(WeightctlError):  # that the others are gone is not what failed first
                    self._exchange(_complaint(error))
            raise
        letters = self._exchange(letter)
        for rank, other in enumerate(letters):
            if "error" in other:
                kind = _KINDS[other["exit_code"]]
                raise kind(f"rank {rank} could not load the model: {other['error']}", other["hint"])
        return result, letters

    def team(self, hosts: Sequence[str]) -> Team:
        """The ranks of this one's host, where `hosts` are those of all ranks."""
        from torch import distributed

        mates = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        everyone = distributed.get_process_group_ranks(self.group)
        return Team(self.group, tuple(everyone[rank] for rank in mates), tuple(mates), mates.index(self.rank))

    def _exchange(self, letter: Letter) -> list[Letter]:
        import torch

        encoded = json.dumps(letter).encode()
        longest = int(self._gather(torch.tensor([len(encoded)], device="cpu")).max())
        letters = self._gather(torch.frombuffer(bytearray(encoded.ljust(longest)), dtype=torch.uint8))
        found = [json.loads(bytes(letter.tolist())) for letter in letters]
        self._over = any("error" in letter for letter in found)
        return found

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's, one after the other. No kernel of torch's is in it, since the first use of one takes 20 ms."""
        import torch

        sent = tensor.to(self._device)
        received = torch.empty((self.size, *sent.shape), dtype=sent.dtype, device=self._device)
        with translated_group_errors(self.group):
            _all_gather(received.view(-1), sent, self.group).wait()
            return received.cpu()


@dataclass(frozen=True)
class Team:
    """The ranks of one host, which share its reads.

    They have no group of their own: whoever makes one needs every process of the world to take part.
    """

    group: ProcessGroup
    addresses: tuple[int, ...]
    """Their ranks in the world."""
    ranks: tuple[int, ...]
    """Their ranks in the group, ordered."""
    index: int
    """This one's place among them."""

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """This one's, in the group."""
        return self.ranks[self.index]

    def gather(self, whole: torch.Tensor) -> Callable[[], list[Work]]:
        """What begins to fill `whole`, of which each rank has one of `size` equal parts, in their order, and gives what
        to wait for.

        To send to one rank after the other, as several hosts must, NCCL sets up channels of their own, the first time.
        """
        from torch import distributed
        from torch.distributed import P2POp, batch_isend_irecv, irecv, isend

        parts = whole.view(self.size, -1).unbind()
        if self.size == 1:
            return list
        if self.size == distributed.get_world_size(self.group):
            return lambda: [_all_gather(whole, parts[self.index], self.group)]
        operations = [
            operation
            for other, part in enumerate(parts)
            if other != self.index
            for operation in (
                P2POp(isend, parts[self.index], self.addresses[other], self.group),
                P2POp(irecv, part, self.addresses[other], self.group),
            )
        ]

        def begin() -> list[Work]:
            works = batch_isend_irecv(operations)
            # Receives first: of a partner that dies gloo tells them, but not a send that is half on its way.
            return [*works[1::2], *works[::2]]

        return begin


def _all_gather(whole: torch.Tensor, part: torch.Tensor, group: ProcessGroup) -> Work:
    from torch import distributed

    # Since torch 2.13 its name is all_gather_single.
    gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    work: Work = gather(whole, part, group=group, async_op=True)
    return work


@contextlib.contextmanager
def translated_group_errors(group: ProcessGroup | None = None) -> Iterator[None]:
    """Turn what torch.distributed raises into a WeightctlError, and leave `group`, if it is one of gloo's."""
    try:
        yield
    except RuntimeError as error:
        if group is not None:
            _leave(group)
        text = str(error).strip().rpartition("Last error:\n")[2]  # NCCL's own words, which follow torch's
        reason = re.sub(r"^\[[^]]*] ", "", text).partition("\n")[0].partition(". ")[0]
        raise WeightctlError(
            f"the ranks lost each other: {reason[:300]}", "another rank may have ended: its own error says why"
        ) from error


def _leave(group: ProcessGroup) -> None:
    """Close this rank's connections: those who wait for it learn by that what it knows, and leave too.

    Of gloo's ranks only those are told who were just then waiting for the one that died. Its groups cannot be aborted,
    but a wait that takes too long closes every connection of the rank. NCCL has a watchdog of its own.
    """
    import torch
    from torch import distributed

    if set(_backends(group).values()) != {"gloo"}:
        return
    for other in distributed.get_process_group_ranks(group):
        if other != distributed.get_rank():
            with contextlib.suppress(RuntimeError):
                nothing = distributed.irecv(torch.empty(1), other, group, tag=LEAVING)
                assert nothing is not None
                nothing.wait(timedelta(milliseconds=1))


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
    """Where letters lie: where the tensors will, so that NCCL knows all ranks before only some of them meet."""
    import torch

    if device == "cpu" or "nccl" not in _backends(group).values():
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
