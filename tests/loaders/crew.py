"""Processes of one torch.distributed group, which do what a test tells them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed

from weightctl.errors import WeightctlError

SECONDS = 300
"""Of waiting for another rank, which may only just begin to import torch: a hang is an error."""


class Crew:
    """`size` ranks, each in a process of its own with a group for every smaller number of them."""

    def __init__(self, connections: list[Connection], processes: list[Any], device: str) -> None:
        self._connections = connections
        self.processes = processes
        self.device = device

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._connections)

    def do(
        self, size: int, job: Callable[..., Any], *arguments: Any, each: list[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        """What `job(group, device, *arguments)` gives, or the error that it raises, on the first `size` ranks.

        `each` has more arguments, for each rank its own.
        """
        for rank, connection in enumerate(self._connections[:size]):
            connection.send((job, size, (*arguments, *(each[rank] if each else ()))))
        answers = []
        for connection in self._connections[:size]:
            assert connection.poll(SECONDS), "a rank hangs"
            with contextlib.suppress(EOFError):
                answers.append(connection.recv())
        return answers


@contextlib.contextmanager
def crew(size: int, device: str = "cpu", timeout: float = SECONDS) -> Iterator[Crew]:
    """Start them, and end them. Their groups wait for `timeout` seconds."""
    # From a process that has imported what all of them need: torch alone takes each seconds.
    context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(["torch.distributed", "weightctl.operations.load"])
    with tempfile.TemporaryDirectory() as scratch:
        pipes = [context.Pipe() for _ in range(size)]
        processes = [
            context.Process(target=_work, args=(rank, size, device, timeout, f"{scratch}/store", pipe[1]), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process, pipe in zip(processes, pipes, strict=True):
            process.start()
            pipe[1].close()
        try:
            yield Crew([pipe[0] for pipe in pipes], processes, device)
        finally:
            for process, pipe in zip(processes, pipes, strict=True):
                pipe[0].close()
                process.join(5)
                process.kill()
                process.join()


def _work(rank: int, size: int, device: str, timeout: float, store: str, connection: Connection) -> None:
    for variable in [name for name in os.environ if name.startswith("WEIGHTCTL_")]:
        del os.environ[variable]
    os.environ.update(HOME=os.path.dirname(store), XDG_CONFIG_HOME=os.path.dirname(store))
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    groups = [distributed.new_group(list(range(count + 1))) for count in range(size)]
    while True:
        try:
            job, count, arguments = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = job(groups[count - 1], device, *arguments)
        except WeightctlError as error:
            answer = error
        except Exception:  # noqa: BLE001
            answer = AssertionError(traceback.format_exc())
        connection.send(answer)
