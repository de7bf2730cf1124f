"""Raw reading reads every byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightctl.benchmark import ceilings
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
