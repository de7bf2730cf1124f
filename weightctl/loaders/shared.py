"""One model for many processes: each reads a share of what its host needs, and they exchange it on their devices."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightctl.errors import IntegrityError, UsageError
from weightctl.loaders.base import Loader
from weightctl.loaders.buffers import let_go_of_errors
from weightctl.loaders.ranks import Letter, Ranks, check_backend, this_host
from weightctl.loaders.relay import Relay
from weightctl.loaders.safetensors import watched_checkpoint
from weightctl.loaders.slices import Plan, cuts
from weightctl.loaders.windows import Asked
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


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
    import torch

    # Of what is made in inference mode, the threads, which are not in it, may change nothing.
    with torch.inference_mode(False), contextlib.ExitStack() as files, let_go_of_errors():
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
            relay.clear()


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
