"""Loads by several processes at once, as `bench --nproc` has them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.command import weightctl
from weightctl.config import Config
from weightctl.operations.bench import bench
from weightctl.progress import Progress


def test_every_process_has_the_model(tmp_path: Path) -> None:
    save_file({f"{n}": torch.randn(100, 33) for n in range(5)}, tmp_path / "model.safetensors")
    result = bench(
        str(tmp_path), strategies=("pipelined", "safetensors"), nproc=2, warm_up=False,
        config=Config(runs=1, device="cpu"), progress=Progress(),
    )  # fmt: skip
    assert result.environment["processes"] == 2
    assert [(row.strategy, row.status, row.verified) for row in result.results] == [
        ("pipelined", "ok", True),
        ("safetensors", "ok", True),
    ]
    assert weightctl("bench", tmp_path, "--nproc", 65).code == 2
