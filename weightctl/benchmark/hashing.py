"""A keyed hash of tensors, computed where they are at the speed of that memory, and what it finds to be other."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightctl.loaders.stored import Entry, as_bytes, misfit
from weightctl.progress import Task

if TYPE_CHECKING:
    import torch

    from weightctl.loaders.stored import Stored

WORD_BYTES = 4
BLOCK_WORDS = 1 << 18
SLAB_BYTES = 16 * BLOCK_WORDS * WORD_BYTES
"""Hashed at once: the products take twice as much beside it, whatever the size of a tensor."""


@dataclass(frozen=True)
class Fingerprint:
    """What a tensor is, and the hash of its bytes."""

    name: str
    dtype: str
    """torch's name: `bfloat16`."""
    shape: tuple[int, ...]
    digest: str


class TensorHash:
    """Two sums modulo 2⁶⁴ for each block, of its 32-bit words times odd 64-bit keys that are random for each place.

    Multilinear hashing (D. Lemire and O. Kaser, Strongly universal string hashing is fast, 2014). A change within one
    word changes both sums for certain, since an odd key has an inverse. For any other, take the word whose difference
    d has the fewest factors of two, 2ᵛ with v < 32: whatever the other keys are, at most one in 2^(63 - v) ≥ 2³² values
    of that word's key makes the sum equal, so that both sums stay equal in one of 2⁶⁴ draws of the keys. Length, dtype,
    shape and name are compared as they are. The keys are drawn anew for each bench, after what they judge was written.
    """

    def __init__(self, key: bytes, device: torch.device | str = "cpu") -> None:
        """`key` is 16 random bytes; equal keys give equal hashes on every device."""
        import torch

        stream = bytearray(hashlib.shake_256(key).digest(2 * BLOCK_WORDS * 8))
        self._keys = (torch.frombuffer(stream, dtype=torch.int64) | 1).view(2, BLOCK_WORDS).to(device)

    def fingerprints(self, tensors: Mapping[str, torch.Tensor]) -> list[Fingerprint]:
        """Of every tensor, all of them on the device of the keys. The device is waited for once."""
        import torch

        sums = {name: list(self._sums(as_bytes(tensor))) for name, tensor in tensors.items()}
        flat = [part for parts in sums.values() for part in parts]
        found = iter(torch.cat(flat).tolist() if flat else [])
        prints = []
        for name, tensor in tensors.items():
            digest = hashlib.blake2b(struct.pack("<Q", tensor.nbytes), digest_size=16)
            for _ in range(sum(map(len, sums[name]))):
                digest.update(struct.pack("<q", next(found)))
            dtype = str(tensor.dtype).removeprefix("torch.")
            prints.append(Fingerprint(name, dtype, tuple(tensor.shape), digest.hexdigest()))
        return prints

    def _sums(self, data: torch.Tensor) -> Iterator[torch.Tensor]:
        """Of each slab of `data` (uint8, one dimension): int64, two sums for each block."""
        import torch

        for start in range(0, len(data), SLAB_BYTES):
            slab = data[start : start + SLAB_BYTES]
            if len(slab) % WORD_BYTES:
                slab = torch.nn.functional.pad(slab, (0, -len(slab) % WORD_BYTES))
            elif slab.data_ptr() % WORD_BYTES or slab.storage_offset() % WORD_BYTES:
                slab = slab.clone()
            words = slab.view(torch.int32)
            whole = len(words) // BLOCK_WORDS * BLOCK_WORDS
            for keys in self._keys:
                if whole:
                    yield (words[:whole].view(-1, BLOCK_WORDS) * keys).sum(1)
                if whole < len(words):
                    yield (words[whole:] * keys[: len(words) - whole]).sum().view(1)


def expected_fingerprints(stored: Stored, key: bytes, task: Task) -> list[Fingerprint]:
    """Of a model's tensors as its files hold them, a batch at a time, each read in parallel."""
    tensor_hash, found = TensorHash(key), []
    for batch in stored.batches():
        found += tensor_hash.fingerprints(stored.read([entry.name for entry in batch]))
        task.advance(sum(entry.nbytes for entry in batch))
    return found


def fingerprint_difference(expected: Sequence[Fingerprint], actual: Sequence[Fingerprint]) -> str | None:
    """What is other in `actual`, in words; None if every name, dtype, shape and hash is equal."""
    if other := misfit(_entries(expected), _entries(actual)):
        return other
    found = {each.name: each.digest for each in actual}
    damaged = next((each.name for each in expected if found[each.name] != each.digest), None)
    return f"the bytes of {damaged} are not the model's" if damaged is not None else None


def _entries(prints: Iterable[Fingerprint]) -> list[Entry]:
    import torch

    return [Entry(each.name, getattr(torch, each.dtype), each.shape, 0) for each in prints]
