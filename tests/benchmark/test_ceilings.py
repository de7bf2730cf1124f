"""Raw reading reads every byte, and what lies in the page cache is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightctl.benchmark import ceilings
from weightctl.benchmark.results import Model
from weightctl.errors import WeightctlError


@pytest.mark.parametrize("threads", [1, 3])
def test_files_are_read_and_forgotten(tmp_path: Path, threads: int) -> None:
    sizes = (0, 1, ceilings.BLOCK_BYTES, 2 * ceilings.BLOCK_BYTES + 5)
    paths = [tmp_path / str(size) for size in sizes]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    assert ceilings.read_files(paths, threads) > 0
    ceilings.forget_files(paths)
    assert ceilings.read_files(paths, threads) > 0
    with pytest.raises(WeightctlError, match="gone"):
        ceilings.read_files([tmp_path / "gone"], threads)


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("size", [1, 100_000, 91_000_000])
def test_to_ask_what_is_cached_changes_nothing(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model"
    path.write_bytes(bytes(size))
    (tmp_path / "empty").touch()
    paths = [tmp_path / "empty", path]
    ceilings.read_files(paths, 2)
    assert min(ceilings.residency(paths) for _ in range(2)) >= ceilings.WARM_RESIDENCY
    ceilings.forget_files(paths)
    assert max(ceilings.residency(paths) for _ in range(5)) <= ceilings.COLD_RESIDENCY  # of busy pages a few stay
    if size > 1:
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
            stream.read(size // 2)
        assert [ceilings.residency(paths) for _ in range(2)] == pytest.approx([0.5, 0.5], abs=0.15)
    assert ceilings.residency([tmp_path / "empty"]) == 1


@pytest.mark.parametrize(
    ("rates", "seconds", "bound"),
    [
        ({"warm_read": 50.0}, 4, "reading"),
        ({"warm_read": 50.0, "warm_map": 100.0}, 2, "mapping"),
        ({"warm_read": 50.0, "host_to_device": 20.0}, 5, "copying"),
        ({"cold_read": 10.0, "host_to_device": 20.0}, 20, "reading"),
    ],
)
def test_the_limit_is_what_takes_longest(rates: dict[str, float], seconds: float, bound: str) -> None:
    (limit,) = ceilings.limits(rates, Model("m", None, "safetensors", 1, 1, 100, None), 200)
    assert (limit.seconds, limit.bound) == (seconds, bound)
