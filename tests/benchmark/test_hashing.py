"""A hash that no change of a tensor survives, equal wherever and however the tensor lies."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_models
from weightctl.benchmark import hashing
from weightctl.benchmark.hashing import TensorHash, expected_fingerprints, fingerprint_difference
from weightctl.loaders import loaders, open_stored
from weightctl.loaders.stored import stored
from weightctl.progress import Task
from weightctl.sources.directory import read_directory

HASH = TensorHash(bytes(range(16)))
BLOCK = hashing.BLOCK_WORDS * hashing.WORD_BYTES


def digest(tensor: torch.Tensor, tensor_hash: TensorHash = HASH) -> str:
    return tensor_hash.fingerprints({"a": tensor})[0].digest


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_every_flipped_bit_is_seen(size: int, data: st.DataObject) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    before = digest(tensor)
    places = data.draw(st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, 7)), min_size=1, max_size=9))
    for place, bit in places:
        tensor[place] ^= 1 << bit
    assert digest(tensor) != before


@pytest.mark.parametrize("size", [BLOCK, BLOCK + 1, hashing.SLAB_BYTES + BLOCK + 6])
def test_every_block_counts(size: int) -> None:
    tensor = torch.zeros(size, dtype=torch.uint8)
    seen = {digest(tensor)}
    places = {0, BLOCK - 1, size // 2, size - 1}
    for place in places:
        tensor[place] = 128
        seen.add(digest(tensor))
        tensor[place] = 0
    assert len(seen) == 1 + len(places)
    # The same two sign bits, which cancel in a sum without keys.
    tensor[[3, 7]] = 128
    assert digest(tensor) not in seen


def test_order_and_length_count() -> None:
    assert digest(torch.tensor([1, 2], dtype=torch.int32)) != digest(torch.tensor([2, 1], dtype=torch.int32))
    assert len({digest(torch.zeros(size, dtype=torch.uint8)) for size in range(9)}) == 9
    blocks = torch.cat([torch.zeros(BLOCK, dtype=torch.uint8), torch.ones(BLOCK, dtype=torch.uint8)])
    assert digest(blocks) != digest(blocks.flip(0))


def test_where_and_how_it_lies_does_not_count() -> None:
    tensor = torch.randn(65, 33)
    room = torch.empty(tensor.nbytes + 8, dtype=torch.uint8)
    for start in (1, 2, 4, 7):
        shifted = room[start : start + tensor.nbytes]
        shifted.copy_(tensor.view(torch.uint8).reshape(-1))
        assert digest(shifted) == digest(tensor.view(torch.uint8).reshape(-1))
    assert digest(tensor.t().contiguous().t()) == digest(tensor)


def test_each_key_is_another_hash() -> None:
    tensor = torch.randn(100)
    assert digest(tensor, TensorHash(secrets.token_bytes(16))) != digest(tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"a": t["b"], "b": t["a"]}, "the bytes of a"),
        (lambda t: {"a": t["a"]}, "lacks b"),
        (lambda t: t | {"c": t["a"]}, "adds c"),
        (lambda t: t | {"b": t["b"].half()}, "b is float16 [6], the model's is float32 [6]"),
        (lambda t: t | {"b": t["b"].view(torch.int32)}, "b is int32 [6]"),
        (lambda t: t | {"b": t["b"].view(2, 3)}, "b is float32 [2, 3]"),
    ],
)
def test_what_is_other_is_said(change: object, words: str) -> None:
    tensors = {"a": torch.rand(6), "b": torch.rand(6), "none": torch.empty(0, 3)}
    expected = expected_fingerprints(stored(tensors), bytes(range(16)), Task())
    assert fingerprint_difference(expected, HASH.fingerprints(tensors)) is None
    assert words in str(fingerprint_difference(expected, HASH.fingerprints(change(tensors))))  # type: ignore[operator]


@pytest.mark.parametrize("make", ["llama", "gpt2", "mixtral"])
def test_the_names_of_transformers_are_understood(tmp_path: Path, make: str) -> None:
    snapshot = read_directory(tiny_models.saved(getattr(tiny_models, make)(), tmp_path))
    loader = loaders.get("transformers")()
    loader.prepare(snapshot)
    loaded = loader.as_stored(loader.load(snapshot, "cpu"), snapshot)
    expected = expected_fingerprints(open_stored(snapshot), bytes(range(16)), Task())
    assert fingerprint_difference(expected, HASH.fingerprints(loaded)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_device_computes_the_same() -> None:
    tensor = torch.randn(3_000_001)
    on_device = TensorHash(bytes(range(16)), "cuda").fingerprints({"a": tensor.cuda()})
    assert on_device == HASH.fingerprints({"a": tensor})
