"""Loads by several processes at once, as `bench --nproc` has them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.command import weightctl


def test_every_process_has_the_model(tmp_path: Path) -> None:
    save_file({f"{n}": torch.randn(100, 33) for n in range(5)}, tmp_path / "model.safetensors")
    strategies = ("--strategy", "pipelined", "--strategy", "safetensors")
    command = ("bench", tmp_path, "--device", "cpu", "--nproc", "2", "--runs", "1", *strategies, "--json")
    result = weightctl(*command).result
    assert result["environment"]["processes"] == 2
    assert [(row["strategy"], row["status"], row["verified"]) for row in result["results"]] == [
        ("pipelined", "ok", True),
        ("safetensors", "ok", True),
    ]
