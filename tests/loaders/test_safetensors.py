"""Every way in which the safetensors library reads, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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
