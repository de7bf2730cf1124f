"""One load by several processes, each with a device of its own: how they meet, load and are judged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weightctl.errors import UsageError
from weightctl.loaders import Loader
from weightctl.loaders.ranks import translated_group_errors
from weightctl.loaders.shared import Wanted, load_together
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Meeting:
    """Those who load at once, as one of them sees them."""

    device: str
    """This one's."""
    rank: int = 0
    group: ProcessGroup | None = None
    """None, if it is alone."""

    def wait(self) -> None:
        """Until all have come here."""
        import torch
        from torch import distributed

        if self.group is not None:
            with translated_group_errors():
                distributed.all_reduce(torch.zeros(1, device=self.device), group=self.group)
                if self.device != "cpu":
                    torch.cuda.synchronize(self.device)

    def load(self, loader: Loader, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        """What this one gets: by `pipelined` together with the others, by any other strategy for itself."""
        if self.group is None or loader.name != "pipelined":
            return loader.load(snapshot, self.device)
        return load_together(self.group, self.device, lambda: Wanted(snapshot, self.device))


def invitations(job: Mapping[str, Any], size: int, store: str) -> list[dict[str, Any]]:
    """The job of each of `size` processes, which meet at the new file `store`."""
    return [{**job, "rank": rank, "ranks": size, "store": store} for rank in range(size)]


@contextlib.contextmanager
def meeting(job: Mapping[str, Any]) -> Iterator[Meeting]:
    """Meet those who have the other jobs. Raises UsageError if there are too few devices.

    Who does not come within the job's `timeout` (seconds) is an error for all.
    """
    device: str = job["device"]
    if job["ranks"] == 1:
        yield Meeting(device)
        return
    import torch
    from torch import distributed

    rank, size = job["rank"], job["ranks"]
    if device != "cpu":
        if size > torch.cuda.device_count():
            raise UsageError(
                f"{size} processes need {size} CUDA devices, torch sees {torch.cuda.device_count()}", "lower --nproc"
            )
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    with translated_group_errors():
        distributed.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            init_method=f"file://{job['store']}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=job["timeout"]),
        )
    try:
        yield Meeting(device, rank, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


def together(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the processes found, as one: the slowest's, with the largest peaks and the first objection of any."""
    slowest = max(outcomes, key=lambda outcome: outcome["seconds"])
    peaks = {
        key: max((outcome[key] for outcome in outcomes if outcome[key] is not None), default=None)
        for key in slowest
        if key.startswith("peak_")
    }
    objections = {
        key: next((outcome[key] for outcome in outcomes if outcome[key]), None)
        for key in slowest.keys() & {"difference", "mark"}
    }
    return {**slowest, **peaks, **objections}
