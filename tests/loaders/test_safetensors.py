"""Every way in which the safetensors library reads, and what is said of what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import weightctl
from weightctl.errors import UsageError
from weightctl.loaders.safetensors import SafetensorsLoader
from weightctl.sources.directory import read_directory

TENSORS = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": torch.ones(3, dtype=torch.bfloat16)}


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_backends(tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCTL_SAFETENSORS_BACKEND", backend)
    save_file(TENSORS, tmp_path / "model.safetensors")
    snapshot = read_directory(tmp_path)
    found = SafetensorsLoader().load(snapshot, "cpu")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    part = SafetensorsLoader().load_part(snapshot, "cpu", {"a", "b"}, {"a": torch.float64, "c": torch.float64})
    assert part.keys() == {"a", "b"}
    assert torch.equal(part["a"], TENSORS["a"].double())


@pytest.mark.parametrize("strategy", ["pipelined", "safetensors"])
def test_what_torch_cannot_hold(tmp_path: Path, strategy: str) -> None:
    """Three rows of F4 are whole bytes, of which the second holds a half of two rows."""
    for name, dtype, shape in (("odd", "F4", [2, 3]), ("six", "F6_E2M3", [2, 2])):
        header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 3]}}).encode()
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
        with pytest.raises(UsageError, match=r"of which torch takes two|torch has no dtype"):
            weightctl.load(tmp_path / name, "cpu", strategy)


def test_prefetch_is_for_cuda_and_newer_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCTL_SAFETENSORS_BACKEND", "prefetch")
    save_file(TENSORS, tmp_path / "model.safetensors")
    reason = "CUDA devices only" if hasattr(safe_open, "prefetch") else "does not prefetch"
    with pytest.raises(UsageError, match=reason):
        SafetensorsLoader().load(read_directory(tmp_path), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and hasattr(safe_open, "prefetch")), reason="no CUDA device, or safetensors < 0.9"
)
def test_prefetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCTL_SAFETENSORS_BACKEND", "prefetch")
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = SafetensorsLoader().load(read_directory(tmp_path), "cuda")
    assert all(torch.equal(found[name].cpu(), TENSORS[name]) for name in TENSORS)
