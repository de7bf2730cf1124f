"""One load by several processes, each with a device of its own: how they meet, and when all of them are ready."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from weightctl.errors import UsageError
from weightctl.loaders.ranks import translated_group_errors

if TYPE_CHECKING:
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
        """Until all have come here, and what their devices had to do is done."""
        import torch
        from torch import distributed

        if self.group is not None:
            with translated_group_errors():
                distributed.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def invitations(job: Mapping[str, Any], size: int, store: str) -> list[dict[str, Any]]:
    """The job of each of `size` processes, which meet at the new file `store`."""
    return [{**job, "rank": rank, "ranks": size, "store": store} for rank in range(size)]


@contextlib.contextmanager
def meeting(job: Mapping[str, Any], device: str, timeout: float) -> Iterator[Meeting]:
    """Meet those who have the other jobs. Raises UsageError if there is no device for this one.

    Who does not come within `timeout` seconds is an error for all.
    """
    if job.get("ranks", 1) == 1:
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
            store=distributed.FileStore(job["store"], size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    try:
        yield Meeting(device, rank, distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


def together(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the processes found, as one: the slowest's time, the largest peaks, the first difference."""
    worst: dict[str, Any] = dict(outcomes[0])
    for key in ("seconds", "peak_host_bytes", "peak_device_bytes"):
        worst[key] = max(outcome[key] for outcome in outcomes)
    worst["difference"] = next((outcome["difference"] for outcome in outcomes if outcome["difference"]), None)
    return worst
