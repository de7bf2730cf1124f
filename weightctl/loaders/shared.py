"""One model for many processes: each reads a share of what its host needs, and they exchange it on their devices."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError
from weightctl.loaders.base import Loader
from weightctl.loaders.blocks import Block, Shard
from weightctl.loaders.buffers import Buffers
from weightctl.loaders.lanes import CudaLane, StraightLane
from weightctl.loaders.pipelined import READER_SHARE, Tuning
from weightctl.loaders.ranks import Letter, Ranks, Team, check_backend, this_host, translated_group_errors
from weightctl.loaders.reading import Source
from weightctl.loaders.safetensors import watched_checkpoint
from weightctl.loaders.slices import Plan, cuts
from weightctl.loaders.windows import DEPTH, Asked, Exchange, Window, schedule
from weightctl.model import Snapshot
from weightctl.storage import in_parallel, pause

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Work


@dataclass(frozen=True)
class Wanted:
    """What one rank's caller asks for."""

    snapshot: Snapshot
    device: str
    names: Collection[str] | None = None
    """All, if None."""
    dtypes: Mapping[str, torch.dtype] | None = None
    """To convert."""


def load_together(
    group: ProcessGroup, device: str | torch.device, wanted: Callable[[], Wanted], plan: Plan | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor that is `wanted`, or this rank's part of it, where `plan` cuts it.

    Every rank of `group` calls it. What one rank raises, in `wanted` too, ends them all; so does IntegrityError if
    their models are not the same. Storage is read once for each host. Of memory, threads and descriptors, only the
    tensors' own outlives this.
    """
    return _load_together(Ranks(group, device), wanted, plan or {})


class SharedLoader(Loader):
    """`pipelined`, by all ranks of a process group: each of them makes the same calls."""

    name = "pipelined"
    formats = ("safetensors",)

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """See `load_together`."""
        return self.load_part(snapshot, device)

    def load_part(
        self,
        snapshot: Snapshot,
        device: str,
        names: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, torch.Tensor]:
        """What is not wanted is read by nobody."""
        return _load_together(self._ranks, lambda: Wanted(snapshot, device, names, dtypes), {})


def _load_together(ranks: Ranks, wanted: Callable[[], Wanted], plan: Plan) -> dict[str, torch.Tensor]:
    with contextlib.ExitStack() as files:
        (asked, _), letters = ranks.agree(lambda: _read_headers(wanted(), plan, ranks, files), lambda read: read[1])
        _check_alike(letters)
        team = ranks.team([letter["host"] for letter in letters])
        relay, _ = ranks.agree(lambda: Relay(asked, team))

        def bring() -> None:
            relay.run()
            files.close()  # raises if they have changed

        try:
            ranks.agree(bring)
            return relay.buffers.tensors()
        finally:
            relay.buffers.clear()  # the traceback of an error would keep them


def _read_headers(wanted: Wanted, plan: Plan, ranks: Ranks, files: contextlib.ExitStack) -> tuple[Asked, Letter]:
    """What there is to load, and what has to be alike on all ranks. Watches the files until `files` is closed."""
    check_backend(ranks.group, wanted.device)
    checkpoint = files.enter_context(watched_checkpoint(wanted.snapshot))
    entries = checkpoint.tensors
    cut = cuts(entries, plan, ranks.size)
    chosen = tuple(entry for entry in entries if wanted.names is None or entry.name in wanted.names)
    asked = Asked(chosen, wanted.device, wanted.dtypes or {}, cut)
    hashes = [file.sha256 for file in checkpoint.files]
    dimensions = {name: one.dimension for name, one in cut.items()}
    letter = {
        "host": this_host(),
        "model": _digest([[entry.name, entry.file.path, entry.offset, entry.dtype, entry.shape] for entry in entries]),
        "contents": _digest(hashes) if all(hashes) else None,
        "wanted": _digest([[e.name, str(asked.dtypes.get(e.name)), dimensions.get(e.name)] for e in chosen]),
    }
    return asked, letter


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_alike(letters: Sequence[Letter]) -> None:
    first = letters[0]
    for rank, letter in enumerate(letters):
        contents = {letter["contents"], first["contents"]} - {None}
        if letter["model"] != first["model"] or len(contents) > 1:
            raise IntegrityError(
                f"the ranks have different models: the files of rank {rank} are not those of rank 0",
                "give every rank the same revision, and pull it again where it is damaged",
            )
        if letter["wanted"] != first["wanted"]:
            raise UsageError(
                f"the ranks ask for different things: rank {rank} for other tensors, dtypes or parts than rank 0",
                "call load alike on every rank",
            )


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
        # Now, since a rank that found no memory in the midst of the exchanges would keep the others waiting.
        flags = self.buffers.allocate(len(self._windows) * team.size).zero_()
        self._failed = flags.view(len(self._windows), team.size)
        self._first = len(shards)  # the lanes' number of the first window
        sources = {entry.file: Source(entry.file.source, entry.file.size) for entry in asked.entries}
        self._sources = [Source(shard.path, shard.file_bytes) for shard in shards]
        self._sources += [sources[window.file] for window in self._windows]
        self._lane = StraightLane if self.buffers.stream is None else CudaLane
        self._streams: list[torch.cuda.Stream] = []
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
            self._streams.append(torch.cuda.current_stream())

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
        begun: deque[_Begun] = deque()
        numbers = deque(number for number, window in enumerate(self._windows) if window.exchange)
        try:
            with translated_group_errors(self._team.group), self._own_stream():
                while numbers or begun:
                    if numbers and len(begun) < DEPTH:
                        begun.append(self._begin(numbers.popleft()))
                    elif self._end(begun.popleft()):
                        numbers.clear()
                        self._stop()
        except BaseException:
            self._stop()
            raise

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        import torch

        if self.buffers.stream is None:
            yield
            return
        stream = torch.cuda.Stream(self.buffers.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(self.buffers.stream)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def _begin(self, number: int) -> _Begun:
        """Begin to exchange a window, when this rank has brought it or has stopped."""
        import torch

        brought = self._wait_for(lambda: not self._left[number])
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)
        exchange = self._windows[number].exchange
        assert exchange is not None
        failed = self._failed[number]
        failed[self._team.index] = not brought
        stretch = self.buffers[exchange.buffer][exchange.first : exchange.last]
        return _Begun(number, exchange, (*self._team.gather(stretch), *self._team.gather(failed)), failed)

    def _end(self, begun: _Begun) -> bool:
        """Whether some rank had failed before the exchange, which is now over."""
        for work in begun.works:
            work.wait()
        for columns in begun.exchange.columns:
            columns.keep(self.buffers[begun.exchange.buffer], self.buffers)
        failed = any(begun.failed.tolist())  # waits for the device
        with self._changed:
            self._over = begun.number
            self._changed.notify_all()
        return failed


@dataclass(frozen=True)
class _Begun:
    """An exchange that is under way."""

    number: int
    """Of its window."""
    exchange: Exchange
    works: Sequence[Work]
    failed: torch.Tensor
    """A number of each rank: not 0, when it is over, if that had stopped."""
