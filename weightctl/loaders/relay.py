"""One of several processes that bring a model together: it reads its share, and exchanges it for the others' shares."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightctl.config import Config
from weightctl.loaders.blocks import Block, Shard
from weightctl.loaders.buffers import Buffers
from weightctl.loaders.cuda import driver, on_stream
from weightctl.loaders.lanes import CudaLane, StraightLane
from weightctl.loaders.pipelined import Tuning
from weightctl.loaders.ranks import Team, translated_group_errors
from weightctl.loaders.reading import Source
from weightctl.loaders.windows import Asked, Window, schedule
from weightctl.storage import in_parallel, pause

if TYPE_CHECKING:
    import torch
    from torch.distributed import Work

READER_SHARE = 1 / 2
"""Of the processors: 17 GB to two H200s with 32 of them take 0.35 s, and cut by a plan 0.39. With 3/4 it is 0.35 and
0.42, with 3/8 0.37 and 0.47."""


class WindowBuffers(Buffers):
    """Buffers that also answer to the numbers of the windows that are brought into them, which follow their own."""

    def __init__(self, shards: Sequence[Shard], windows: Sequence[Window], device: str) -> None:
        """Takes all the memory. Raises WeightctlError if the device has not enough of it."""
        super().__init__(shards, device)
        self._targets = [*range(len(shards)), *(window.buffer for window in windows)]
        for index in range(len(shards)):
            self[index]

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(self._targets[index])


class Relay:
    """Threads that read this rank's blocks, window after window, and one that exchanges the windows in that order.

    A rank that fails reads no more, but goes on exchanging whatever its buffers hold, so that nobody waits for it.
    With each window goes whether somebody has failed: all ranks learn that of the same window, and stop at the same.
    """

    def __init__(self, asked: Asked, team: Team) -> None:
        """Raises WeightctlError if the device has not enough free memory."""
        share = sum(entry.nbytes for entry in asked.entries) // team.size
        tuning = Tuning.of(share, Config.load().ring_bytes)
        processors = math.ceil(READER_SHARE * len(os.sched_getaffinity(0)) / team.size)  # the others have as many
        self._tuning = dataclasses.replace(tuning, readers=min(tuning.readers, processors))
        self._team = team
        shards, self._windows = schedule(asked, team, self._tuning.block_bytes)
        self.buffers = WindowBuffers(shards, self._windows, asked.device)
        self._exchanges = deque(self._prepared())
        self._first = len(shards)  # the lanes' number of the first window
        sources = {entry.file: Source(entry.file.source, entry.file.size) for entry in asked.entries}
        files = [*(shard.file for shard in shards), *(window.file for window in self._windows)]
        self._sources = [sources[file] for file in files]
        self._lane = StraightLane if self.buffers.stream is None else CudaLane
        self._sent: list[tuple[torch.cuda.Stream, torch.cuda.Event]] = []
        self._blocks: deque[tuple[int, Block]] = deque()  # of what is exchanged
        self._own: deque[tuple[int, Block]] = deque()
        for number, window in enumerate(self._windows):
            (self._blocks if window.exchange else self._own).extend((number, block) for block in window.blocks)
        self._left = [len(window.blocks) for window in self._windows]
        self._over = -1  # the last window whose exchange is
        self._stopped = False
        self._changed = threading.Condition()

    def run(self) -> None:
        """Bring everything. Raises what this rank raises; returns early if another has failed."""
        readers = min(self._tuning.readers, len(self._blocks) + len(self._own))
        with ThreadPoolExecutor(1) as pool:
            exchanging = pool.submit(self._exchange)
            try:
                if readers:
                    in_parallel(self._read, range(readers), readers)
                exchanging.result()
            finally:
                self._stop()

    def clear(self) -> None:
        """Give the memory back that is nobody else's."""
        self.buffers.clear()
        self._exchanges.clear()

    def _prepared(self) -> Iterator[_Exchange]:
        """Now, since every call of torch's is one more wait for Python's lock once a dozen readers want it too, and
        since a rank that found no memory in the midst of the exchanges would keep the others waiting."""
        numbers = [number for number, window in enumerate(self._windows) if window.exchange]
        news = self.buffers.allocate(len(numbers) * self._team.size).zero_().view(-1, self._team.size)
        for number, failed in zip(numbers, news.unbind(), strict=True):
            exchange = self._windows[number].exchange
            assert exchange is not None
            buffer = self.buffers[exchange.buffer]
            kept = tuple(columns.views(buffer, self.buffers) for columns in exchange.columns)
            stretch = buffer[exchange.first : exchange.last]
            yield _Exchange(number, (self._team.gather(stretch), self._team.gather(failed)), kept, failed)

    def _read(self, _: int) -> None:
        tuning = self._tuning
        try:
            with contextlib.closing(self._lane(self._sources, self.buffers, tuning.block_bytes, tuning.slabs)) as lane:
                self._register_stream()
                for number, block in self._taken():
                    pause(0)
                    lane.bring(self._first + number, block)
                    self._count(number)
        except BaseException:
            self._stop()
            raise

    def _register_stream(self) -> None:
        import torch

        if self.buffers.stream is not None:
            sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record()  # what brings its handle into being
            self._sent.append((torch.cuda.current_stream(), sent))

    def _taken(self) -> Iterator[tuple[int, Block]]:
        """Whoever asks takes the next block of what is exchanged, or of the rest while that has no room."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._own or not self._blocks or self._has_room())
                queue = self._blocks if self._blocks and self._has_room() else self._own
                if self._stopped or not queue:
                    return
                block = queue.popleft()
            yield block

    def _has_room(self) -> bool:
        return self._windows[self._blocks[0][0]].after <= self._over

    def _count(self, number: int) -> None:
        with self._changed:
            self._left[number] -= 1
            if not self._left[number]:
                self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true; else this rank has stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or condition())
            return not self._stopped

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _exchange(self) -> None:
        try:
            with translated_group_errors(self._team.group), self._own_stream() as stream:
                while self._exchanges:
                    if self._tells_of_failure(self._exchanges.popleft(), stream):
                        self._stop()
                        return
        except BaseException:
            self._stop()
            raise

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[torch.cuda.Stream | None]:
        import torch

        if self.buffers.stream is None:
            yield None
            return
        stream = torch.cuda.Stream(self.buffers.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(self.buffers.stream)
        with on_stream(stream):
            yield stream
            stream.synchronize()

    def _tells_of_failure(self, exchange: _Exchange, stream: torch.cuda.Stream | None) -> bool:
        """Exchange a window, when this rank has brought it or has stopped. What lay in a stage has then been copied."""
        brought = self._wait_for(lambda: not self._left[exchange.number])
        for lane, sent in list(self._sent):
            assert stream is not None
            driver().record(sent.cuda_event, lane.cuda_stream)
            driver().wait(stream.cuda_stream, sent.cuda_event)
        if not brought:
            exchange.failed[self._team.index] = True
        for work in [work for gather in exchange.gathers for work in gather()]:
            work.wait()
        for place, stretch in exchange.kept:
            place.copy_(stretch)
        failed = any(exchange.failed.tolist())  # waits for the device, and so for the copies
        with self._changed:
            self._over = exchange.number
            self._changed.notify_all()
        return failed


@dataclass(frozen=True)
class _Exchange:
    """What is done once a window is there."""

    number: int
    """Of its window."""
    gathers: Sequence[Callable[[], list[Work]]]
    kept: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Where something of it is then copied, and from where in the stage."""
    failed: torch.Tensor
    """A number of each rank, when it is over: not 0 if that had stopped before."""
